import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import io.debezium.engine.format.Json;
import java.io.Reader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Properties;

/**
 * The Debezium engine over one backlog, its JSON thrown away: what `make bench-peers` measures beside the daemon.
 *
 * Usage: Peer PROPERTIES CHANGES. Prints, each on a line of its own with the time in microseconds since 1970:
 * "half" when half of the changes have come, "end" with the number of changes and of JSON characters when the
 * message that ends the backlog has come. Then it waits until its input is closed, so that it can be looked at.
 * Ends with 1 and the reason on stderr if the engine gives up.
 */
public final class Peer implements DebeziumEngine.ChangeConsumer<ChangeEvent<String, String>> {
    private final long half;
    private final String messages;
    private long changes;
    private long characters;

    private Peer(long expected, String messages) {
        this.half = Math.max(1, expected / 2);
        this.messages = messages;
    }

    @Override
    public void handleBatch(
            List<ChangeEvent<String, String>> batch,
            DebeziumEngine.RecordCommitter<ChangeEvent<String, String>> committer) throws InterruptedException {
        for (ChangeEvent<String, String> event : batch) {
            if (event.destination().equals(messages)) {
                // Others may leave messages in the WAL too; "bench" is that of our backlog.
                if (event.key().contains("\"bench\"")) {
                    say("end", changes + " " + characters);
                }
            } else {
                changes++;
                characters += event.value() == null ? 0 : event.value().length();
                if (changes == half) {
                    say("half", "");
                }
            }
            // As a consumer must: only what is marked is ever confirmed to the server.
            committer.markProcessed(event);
        }
        committer.markBatchFinished();
    }

    private static void say(String what, String more) {
        java.time.Instant now = java.time.Instant.now();
        System.out.println((what + " " + (now.getEpochSecond() * 1_000_000 + now.getNano() / 1000) + " " + more).strip());
        System.out.flush();
    }

    public static void main(String[] args) throws Exception {
        Properties properties = new Properties();
        try (Reader reader = Files.newBufferedReader(Path.of(args[0]))) {
            properties.load(reader);
        }
        Peer peer = new Peer(Long.parseLong(args[1]), properties.getProperty("topic.prefix") + ".message");
        DebeziumEngine<ChangeEvent<String, String>> engine = DebeziumEngine.create(Json.class)
                .using(properties)
                .notifying(peer)
                .using((DebeziumEngine.CompletionCallback) (success, message, error) -> {
                    if (!success) {
                        System.err.println(message);
                        Runtime.getRuntime().halt(1);
                    }
                })
                .build();
        Thread thread = new Thread(engine, "engine");
        thread.setDaemon(true);
        thread.start();
        while (System.in.read() >= 0) {
            // Nothing is said to us; the end of the input is all we wait for.
        }
        // What is thrown away needs no orderly end: the slot is a copy, and the offsets die with the process.
        Runtime.getRuntime().halt(0);
    }
}

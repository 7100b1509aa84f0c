"""The commands, one small function per verb: `verb(call) -> exit code`. Arguments are declared in cdc.cli."""

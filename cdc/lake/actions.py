"""Delta commits that deltalake's writer cannot make: those that change the table's schema or configuration.

One commit is one JSON object of the table's log, put under the condition that it does not exist: the same rule by
which deltalake itself commits, so both may be used side by side. Knows the protocol's actions and the features that a
schema needs; decides nothing about tokens and races (cdc.lake.delta does).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.transaction import AddAction, RemoveAction

_NTZ = "timestampNtz"
_LEGACY_FEATURES = ("appendOnly", "invariants")
"""What writer version 2 means, once features are named one by one."""


def same_schema(table: DeltaTable, schema: pa.Schema) -> bool:
    """Whether the table has exactly this schema, metadata included."""
    ours, theirs = json.loads(Schema.from_arrow(schema).to_json()), json.loads(table.schema().to_json())
    return bool(ours == theirs)


def metadata_actions(
    table: DeltaTable, schema: pa.Schema | None, configuration: Mapping[str, str]
) -> list[dict[str, Any]]:
    """`metaData` with another schema (None: as it is) and further configuration; `protocol` if the schema needs it."""
    known = table.metadata()
    text = (table.schema() if schema is None else Schema.from_arrow(schema)).to_json()
    actions: list[dict[str, Any]] = [
        {
            "metaData": {
                "id": str(known.id),
                "name": known.name,
                "description": known.description,
                "format": {"provider": "parquet", "options": {}},
                "schemaString": text,
                "partitionColumns": list(known.partition_columns),
                "configuration": {**known.configuration, **configuration},
                "createdTime": known.created_time,
            }
        }
    ]
    protocol = table.protocol()
    readers, writers = list(protocol.reader_features or ()), list(protocol.writer_features or ())
    if "timestamp_ntz" in text and _NTZ not in readers:
        actions.append(
            {
                "protocol": {
                    "minReaderVersion": 3,
                    "minWriterVersion": 7,
                    "readerFeatures": [*readers, _NTZ],
                    "writerFeatures": [*(writers or _LEGACY_FEATURES), _NTZ],
                }
            }
        )
    return actions


def file_actions(adds: Sequence[AddAction], removes: Sequence[RemoveAction]) -> list[dict[str, Any]]:
    """`add` and `remove` of data files."""
    added = [
        {
            "add": {
                "path": a.path,
                "partitionValues": a.partition_values,
                "size": a.size,
                "modificationTime": a.modification_time,
                "dataChange": a.data_change,
                "stats": a.stats,
            }
        }
        for a in adds
    ]
    removed = [
        {
            "remove": {
                "path": r.path,
                "deletionTimestamp": r.deletion_timestamp,
                "dataChange": r.data_change,
                "extendedFileMetadata": True,
                "partitionValues": r.partition_values,
                "size": r.size,
            }
        }
        for r in removes
    ]
    return removed + added


def commit_text(actions: Sequence[Mapping[str, Any]], tokens: Mapping[str, int], info: Mapping[str, Any]) -> bytes:
    """The object of one commit."""
    now = int(time.time() * 1000)
    first = {"commitInfo": {"timestamp": now, "operation": "WRITE", "engineInfo": "cdc", **info}}
    tokened = [{"txn": {"appId": a, "version": v, "lastUpdated": now}} for a, v in tokens.items()]
    return b"\n".join(orjson.dumps(a) for a in (first, *tokened, *actions)) + b"\n"

"""Find the rows of a corpus table whose values cannot be right; such a row is a bad file."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

SPLITS = ("train", "valid", "test")
# Columns of usable files, and the smallest possible value.
_LOWEST = {"num_frames": 1, "sample_rate": 1, "num_channels": 1, "offset": 0, "peak": 0, "rms": 0}


def cast_types(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give the columns the types of a schema, if no value is lost; other programs change them."""
    if set(table.column_names) != set(schema.names):
        return table
    try:
        return table.select(schema.names).cast(schema)
    except pa.ArrowException:
        return table


def describe_types(table: pa.Table, schema: pa.Schema) -> str:
    """The columns that differ from a schema in name or type, or ""."""
    names = table.column_names
    missing = [name for name in schema.names if name not in names]
    surplus = [name for name in names if name not in schema.names]
    notes = [f"no column `{name}`" for name in missing]
    notes += [f"an unknown column `{name}`" for name in surplus]
    notes += [
        f"column `{field.name}` of {table.schema.field(field.name).type}, not {field.type}"
        for field in schema
        if field.name in names and table.schema.field(field.name).type != field.type
    ]
    return "it has " + "; ".join(notes) if notes else ""


def mark_impossible(table: pa.Table) -> pa.Table:
    """Give every row with a missing or impossible value the status "bad" and a reason.

    Missing values become "" or 0. The modification time of these rows becomes unknown, so that the
    next index of the corpus decodes their files again.
    """
    if table.num_rows == 0:
        return table
    reasons = pa.nulls(table.num_rows, pa.string())
    for mask, reason in _defects(table):
        if not pc.any(mask).as_py():
            continue
        is_first = pc.and_(pc.fill_null(mask, False), pc.is_null(reasons))
        reasons = pc.if_else(is_first, reason, reasons)
    if reasons.null_count == table.num_rows:
        return table
    is_bad = pc.is_valid(reasons)
    changes = {"status": "bad", "reason": reasons, "mtime_ns": -1}
    for number, field in enumerate(table.schema):
        column = pc.fill_null(table[field.name], "" if field.type == pa.string() else 0)
        if field.name in changes:
            column = pc.if_else(is_bad, changes[field.name], column).cast(field.type)
        table = table.set_column(number, field, column)
    return table.combine_chunks()


def _defects(table: pa.Table) -> Iterator[tuple[pa.ChunkedArray, str]]:
    """Pairs of (mask of the rows, reason)."""
    columns = {name: table[name] for name in table.column_names}
    for name, column in columns.items():
        yield pc.is_null(column), f"damaged table: no `{name}`"
    is_ok = pc.equal(columns["status"], "ok")
    for name, known in (("status", ("ok", "bad")), ("split", ("", *SPLITS))):
        is_known = pc.is_in(columns[name], pa.array(known))
        yield pc.invert(is_known), f"damaged table: unknown `{name}`"
    for name, lowest in _LOWEST.items():
        values = columns[name].cast(pa.float64(), safe=False)
        # NaN is not at least `lowest`.
        is_possible = pc.and_(pc.greater_equal(values, lowest), pc.less(values, 2.0**62))
        yield pc.and_(is_ok, pc.invert(is_possible)), f"damaged table: impossible `{name}`"

"""Ray Data: a class for `map_batches`, and `entra score --engine ray` over it, for corpora that one machine is too small for.

Decisions taken here:

- The input becomes Parquet first, whatever it was: a number for each row, its columns, and what `entra.source` found to be its
  prompt and completion. Ray's checkpoint needs unique ids, in Parquet. One process does that before scoring begins.
- A run that goes on is Ray's business: its checkpoint commits the ids of a file of rows once the file is there. At the end the
  row numbers are counted, so that a row that is missing or written twice is an error and never a wrong file.
- Ray does not keep the order of rows. The column `entra_row` tells it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from entra.config import ScoreConfig
from entra.rows import Row
from entra.shapes import from_table, rows_of, take
from entra.source import SIDECAR, Source
from entra.whole_file import write_whole

ROW = "entra_row"
"""The column of a row's number in the input, counted from 0."""
_STAGED = "entra_staged"
"""What a row of the input holds beside its columns, as JSON: malformed, prompt, completion, fault of `entra.rows.Row`."""
_MOST_ROWS = 1_024
"""Rows of a file that is scored as one piece: what a killed run scores again."""
_LEAST_CPUS = 6
"""Logical CPUs of a local Ray: reading, filtering, scoring and writing hold one each; with 2 the pipeline starved."""


class RayScorer:
    """Adds the columns of `entra score` to tables of rows; a class for `ray.data.Dataset.map_batches`, one model per actor.

        ray.data.read_parquet("traces/").map_batches(
            RayScorer, fn_constructor_kwargs={"model": "M"}, batch_format="pyarrow", batch_size=16, num_gpus=0.5
        )

    Added are reward (in 0 to 1), tokens, mean_logprob (nats), mean_incoming and protected_tokens. A row that cannot be scored
    gets an error (kind and message) instead, and its neighbours are not touched.

    Args:
        model: a folder, a hub name, or "smollm2". Every node of the cluster must be able to read it.
        config: the options of the method. None: the defaults.
        prompt_column: text, chat messages or token ids. None: it is found.
        completion_column: the same.
        prefix: comes before the names of the added columns.
        details: add the tokens' token_ids, logprobs, incoming, importance and protected, too.
        apply_chat_template: a prompt that is text becomes a user message of the model's chat template.
        how: device, dtype and revision, as `entra score` takes them.

    Raises:
        CommandError: there is no such model, or it cannot be scored with.
    """

    def __init__(
        self,
        model: str,
        *,
        config: ScoreConfig | None = None,
        prompt_column: str | None = None,
        completion_column: str | None = None,
        prefix: str = "",
        details: bool = False,
        apply_chat_template: bool = False,
        **how: Any,
    ) -> None:
        from entra.cli.scoring import Scorer, load

        self._columns = (prompt_column, completion_column)
        self._prefix, self._details = prefix, details
        policy = load(model, **{name: value for name, value in how.items() if value is not None})
        self._scorer = Scorer(policy, ScoreConfig() if config is None else config, apply_chat_template)

    def __call__(self, table: Any) -> Any:
        """The pyarrow.Table of a batch, with its columns in their order and the added ones behind them.

        Raises:
            CommandError: nobody can tell the columns, or a row holds several completions.
        """
        import pyarrow as pa  # type: ignore[import-untyped]

        from entra.cli.score import added_to

        rows = [self._staged(columns) for columns in table.to_pylist()] if _STAGED in table.column_names else self._rows(table)
        added = [added_to(scores, self._prefix, self._details) for scores in self._scorer.score(rows)]
        for name, kind in self._kinds().items():
            table = table.append_column(name, pa.array([row.get(name) for row in added], kind))
        return table.drop_columns([_STAGED]) if _STAGED in table.column_names else table

    def _staged(self, columns: dict[str, Any]) -> Row:
        malformed, prompt, completion, fault = json.loads(columns[_STAGED])
        return Row(columns, malformed, prompt, completion, fault)

    def _rows(self, table: Any) -> list[Row]:
        from entra.commands import CommandError

        taken = take(table.column_names, *self._columns, where="the dataset")
        rows = list(chain.from_iterable(rows_of(Row(from_table(columns)), taken) for columns in table.to_pylist()))
        if len(rows) != table.num_rows:
            raise CommandError("a row holds several completions; make each a row of its own before, with flat_map")
        return rows

    def _kinds(self) -> dict[str, Any]:
        """The added columns and their types."""
        import pyarrow as pa

        from entra.cli.columns import DETAIL_COLUMNS, ERROR_COLUMN, SCORE_COLUMNS

        whole = {"tokens", "protected_tokens"}
        kinds = {name: pa.int64() if name in whole else pa.float64() for name in SCORE_COLUMNS}
        if self._details:
            inside = {"token_ids": pa.int64(), "protected": pa.bool_()}
            kinds |= {name: pa.list_(inside.get(name, pa.float64())) for name in DETAIL_COLUMNS}
        return {self._prefix + name: kind for name, kind in {**kinds, ERROR_COLUMN: pa.string()}.items()}


def score_folder(options: argparse.Namespace) -> None:
    """`entra score --engine ray` with parsed options: files of traces in, a folder of Parquet files out.

    Raises:
        CommandError: what stops a run; rows that cannot be scored do not.
    """
    from entra.cli.fingerprint import fingerprint
    from entra.cli.output import FORMAT, check, json_value
    from entra.cli.score import IDENTITY, Summary, versions
    from entra.cli.scoring import config_of, tell
    from entra.commands import CommandError

    started = time.monotonic()
    config, output = config_of(options), options.output
    source = _source(options)
    tell(options, *source.lines())
    staged, checkpoint = output / ".entra" / "input", output / ".entra" / "checkpoint"
    identity = {
        "engine": "ray",
        "input": source.record(),
        "config": asdict(config),
        **{name: getattr(options, name) for name in IDENTITY},
        "versions": versions(),
        "model_files": fingerprint(options.model, options.revision, options.quiet),
    }
    if staged.exists():
        check(staged, identity, f"use another --output, or remove the folder {output}")
    elif output.exists() and any(path.name != ".entra" for path in output.iterdir()):
        raise CommandError(f"--output {output} is a folder with other files; name one that is empty, or is not there")
    else:
        staged.parent.mkdir(parents=True, exist_ok=True)
        content = {"written_by": "entra score", "format": FORMAT, **identity, "model": options.model}
        write_whole(staged.with_name(staged.name + SIDECAR), json.dumps(content, indent=1, default=json_value) + "\n")
        _stage(source, staged, options.batch_size)
    earlier = _rows_of(output)
    if len(earlier) < source.rows:
        _run(options, config, staged, checkpoint)
    _check_rows(output, source.rows)
    summary = Summary(options.prefix)
    for row in _scores(output, [options.prefix + name for name in ("reward", "tokens", "error")]):
        summary.add(row)
    summary.earlier = len(earlier)
    tell(options, *summary.lines(output, time.monotonic() - started))
    summary.check()


def _source(options: argparse.Namespace) -> Source:
    """The input, after a look at everything that can be refused before it is copied."""
    from entra.cli.score import choose_prefix
    from entra.cli.scoring import check_scoring_flags
    from entra.commands import CommandError

    try:
        import ray.data  # noqa: F401
    except ImportError:
        raise CommandError("--engine ray needs Ray Data; get it with: pip install 'entra-reward[ray]'") from None
    output = options.output
    if options.overwrite:
        raise CommandError("--overwrite does not go with --engine ray; name another --output, or remove the folder")
    if output.suffix or (output.exists() and not output.is_dir()):
        raise CommandError(f"--output {output}: --engine ray writes a folder of Parquet files; name a folder")
    check_scoring_flags(options)
    source = Source(
        options.traces, prompt=options.prompt_column, completion=options.completion_column, limit=options.limit, output=output
    )
    inside = [path for path in source.paths if output.resolve() in path.resolve().parents]
    if inside or source.piped:
        what = f"{inside[0]} is in --output" if inside else "a pipe can be read only once"
        raise CommandError(f"--engine ray: {what}, so a run could not go on; name files elsewhere")
    choose_prefix(options, source)
    taken = [name for name in (ROW, _STAGED) if name in source.columns]
    if taken:
        raise CommandError(f"--engine ray adds a column that the input has: {', '.join(taken)}; rename or drop it")
    return source


def _stage(source: Source, folder: Path, batch_size: int) -> None:
    """Write the input as Parquet files of one schema; the folder is there when all of them are."""
    from pyarrow import Table, parquet

    from entra.cli.formats import convert
    from entra.cli.output import json_line

    unfinished = folder.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    lines, whole = unfinished / "rows.jsonl", unfinished / "rows.parquet"
    with lines.open("wb") as file:
        for number, row in enumerate(source.read()):
            beside = json.dumps([row.malformed, row.prompt, row.completion, row.fault], default=str)
            file.write(json_line({**row.columns, ROW: number, _STAGED: beside}))
    convert(lines, whole)
    lines.unlink()
    # Several batches a file, and more files than a small cluster has workers.
    size = min(_MOST_ROWS, batch_size * max(1, source.rows // (16 * batch_size)))
    with parquet.ParquetFile(whole) as rows:
        for number, batch in enumerate(rows.iter_batches(size)):
            parquet.write_table(Table.from_batches([batch]), unfinished / f"{number:06}.parquet")
    whole.unlink()
    unfinished.rename(folder)


def _run(options: argparse.Namespace, config: ScoreConfig, staged: Path, checkpoint: Path) -> None:
    """Score the rows that the checkpoint does not know."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    from entra.cli import one_line
    from entra.commands import CommandError

    try:
        if not ray.is_initialized():
            # Without an address Ray would join whatever cluster happens to run on this machine.
            cpus = max(_LEAST_CPUS, os.cpu_count() or 1)
            ray.init(**({} if "RAY_ADDRESS" in os.environ else {"address": "local", "num_cpus": cpus}))
        gpus = ray.cluster_resources().get("GPU", 0)
        per_worker = options.gpus_per_worker if options.gpus_per_worker is not None else float(gpus > 0)
        workers = options.workers or max(1, int(gpus / per_worker) if per_worker else 1)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = not options.quiet
        # Ray 2.60 makes one piece of work of all files up to 128 MiB, unless this says how many bytes.
        os.environ.setdefault("RAY_DATA_PARQUET_BIN_PACKING_BYTES", "1")
        context.checkpoint_config = CheckpointConfig(
            id_column=ROW, checkpoint_path=str(checkpoint.resolve()), delete_checkpoint_on_success=False
        )
        names = ("model", "prefix", "details", "apply_chat_template", "device", "dtype", "revision")
        files = sorted(map(str, staged.resolve().glob("*.parquet")))
        ray.data.read_parquet(files, override_num_blocks=len(files)).map_batches(
            RayScorer,
            fn_constructor_kwargs={"config": config, **{name: getattr(options, name) for name in names}},
            batch_size=options.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=per_worker,
        ).write_parquet(str(staged.resolve().parents[1]))
    except KeyboardInterrupt:
        raise CommandError("interrupted; the same command goes on from there", exit_code=130) from None
    except (ray.exceptions.RayError, OSError, ValueError) as error:
        raise CommandError(f"Ray stopped: {one_line(error)}; the same command goes on from there", 1) from error


def _rows_of(output: Path) -> list[int]:
    """The numbers of the rows that are there, as they come."""
    return [row[ROW] for row in _scores(output, [ROW])]


def _scores(output: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Columns of all rows that are there; what a killed run left of a file is not read, and Ray writes it again."""
    from pyarrow import ArrowException, parquet

    rows: list[dict[str, Any]] = []
    for path in sorted(output.glob("*.parquet")):
        try:
            rows += parquet.read_table(path, columns=list(columns)).to_pylist()
        except (ArrowException, OSError):
            continue
    return rows


def _check_rows(output: Path, count: int) -> None:
    from entra.commands import CommandError

    found = _rows_of(output)
    if sorted(found) != list(range(count)):
        twice = len(found) - len(set(found))
        raise CommandError(
            f"{output} holds {len(set(found)):,} of {count:,} rows, and {twice:,} of them more than once; give the command "
            "again with another --output",
            1,
        )

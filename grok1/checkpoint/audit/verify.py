"""Verification of a checkpoint: its structure, the content of its arrays, and its hashes against a manifest."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from grok1.checkpoint.audit.content import check_content, is_hollow
from grok1.checkpoint.audit.manifest import (
    Entry,
    HashCache,
    cannot_write,
    hash_files,
    locate,
    read_manifest,
    write_manifest,
)
from grok1.checkpoint.parallel import ByteProgress, in_parallel
from grok1.checkpoint.pickled.framing import tensor_file_size
from grok1.checkpoint.pickled.source import ScanError
from grok1.checkpoint.reader import find_checkpoint, stated_or_release
from grok1.checkpoint.structure import FileFault, Structure, find_faults
from grok1.config import PRESETS, ModelConfig
from grok1.errors import CheckpointError
from grok1.params.table import CHECKPOINT_DIR

_RELEASE = "xai-org/grok-1"
_COMPANIONS = ("config.json", "tokenizer.model")  # needed by a model, in addition to the tensor files
_AGAIN = "download it again"

StageProgress = Callable[[str, int, int], None]
"""Called with the name of the stage, the bytes read so far and the total."""


@dataclass
class Report:
    """The result of a verification.

    Attributes:
        directory: the directory of tensor files.
        config: from `config.json`, or else the release's.
        stated: whether there is a `config.json`.
        structure: what the tensor files hold.
        faults: in the order of the files; a file may have several.
        warnings: unlikely but possible values, in the same form.
        resumed: number of files that were hashed by an interrupted run.
    """

    directory: Path
    config: ModelConfig
    stated: bool
    structure: Structure
    faults: list[FileFault]
    warnings: list[FileFault] = field(default_factory=list)
    resumed: int = 0

    @property
    def files(self) -> int:
        """Expected number of tensor files."""
        return len(self.structure.table)

    @property
    def hollow(self) -> bool:
        """Whether the files have the shapes of a checkpoint but no weights."""
        return any(fault.file == self.directory.name for fault in self.faults)

    @property
    def to_fetch(self) -> list[str]:
        """Names of the files that a download would repair."""
        return list(dict.fromkeys(fault.file for fault in self.faults if fault.fetch))

    @property
    def fetch_command(self) -> str | None:
        """The command that downloads these files; None if there are none, or if this is not the release."""
        names = [name for name in self.to_fetch if name.startswith("tensor")]
        if (
            not (names or self.hollow)
            or self.stated
            or self.config != PRESETS["grok-1"]
            or self.directory.name != CHECKPOINT_DIR
        ):
            return None
        if self.hollow or len(names) == self.files:
            which = "--include " + shlex.quote(f"{CHECKPOINT_DIR}/*")
        else:
            which = " ".join(f"{CHECKPOINT_DIR}/{name}" for name in names)
        # Without --force-download, an existing file may be considered complete.
        present = self.hollow or any(fault.fault != "is missing" for fault in self.faults if fault.fetch)
        force = " --force-download" if present else ""
        folder = shlex.quote(str(self.directory.parent))
        return f"hf download {_RELEASE} {which} --repo-type model{force} --local-dir {folder}"


def verify(
    path: Path,
    *,
    content: bool = False,
    manifest: Path | None = None,
    new_manifest: Path | None = None,
    progress: StageProgress | None = None,
) -> Report:
    """Verify a checkpoint and list all its faults.

    Args:
        path: a directory that holds `ckpt-0`, or the directory of tensor files itself.
        content: reads every array and checks its values.
        manifest: a manifest to check every file against; reads every file.
        new_manifest: manifest to write if no fault is found; reads every file.
        progress: called every few megabytes in this thread.

    Raises:
        CheckpointError: if no checkpoint is found, or a manifest cannot be read or written.
        ConfigError: if `config.json` is invalid.
    """
    directory = find_checkpoint(path).absolute()
    config, stated = stated_or_release(directory)
    entries = read_manifest(manifest) if manifest is not None else None  # before hours of reading
    if new_manifest is not None:
        _check_manifest_path(new_manifest, directory)
    structure = find_faults(directory, config)
    report = Report(directory, config, stated, structure, list(structure.faults))
    if content:
        _check_content(report, progress)
    if manifest is not None and entries is not None:
        _check_manifest(report, manifest, entries, progress)
    order = {spec.file_name: spec.index for spec in structure.table}
    for found in (report.faults, report.warnings):
        found.sort(key=lambda fault: order.get(fault.file, len(order)))
    if new_manifest is not None and not report.faults:
        _write_manifest(report, new_manifest, progress)
    return report


def _check_content(report: Report, progress: StageProgress | None) -> None:
    structure = report.structure
    right = [spec for spec in structure.table if spec.index in structure.tensors]
    hollow = []
    for spec in right:
        with contextlib.suppress(ScanError, OSError):  # reported by `check_content`
            if is_hollow(report.directory / spec.file_name, structure.tensors[spec.index]):
                hollow.append(spec)
    hollow_bytes = sum(tensor_file_size(spec) for spec in hollow)
    if hollow and hollow_bytes * 2 > structure.total_bytes:
        report.faults.append(
            FileFault(
                report.directory.name,
                f"is hollow: {len(hollow)} of {report.files} files, {hollow_bytes:,} of {structure.total_bytes:,} "
                "bytes, are sparse and contain no weights",
                "download the weights",
                fetch=False,
            )
        )
        return
    for spec in hollow:
        fault = f"({spec.parameter}) is hollow: its data are sparse and contain no weights"
        report.faults.append(FileFault(spec.file_name, fault, _AGAIN))
    rest = [spec for spec in right if spec not in hollow]
    checked = in_parallel(
        rest,
        lambda spec, advance: check_content(
            report.directory / spec.file_name, spec, structure.tensors[spec.index], advance
        ),
        sum(spec.array_bytes for spec in rest),
        _stage("checking values", progress),
    )
    with contextlib.closing(checked):
        for spec, found in checked:
            for reported, clauses, advice in (
                (report.faults, found.faults, _AGAIN),
                (report.warnings, found.warnings, "compare its hash with a manifest"),
            ):
                if clauses:
                    reported.append(FileFault(spec.file_name, f"({spec.parameter}) {'; '.join(clauses)}", advice))


def _check_manifest_path(manifest: Path, directory: Path) -> None:
    """Raise if the manifest would overwrite a file that it lists, or be taken for a tensor file."""
    path = manifest.absolute()
    taken = path.parent.resolve() == directory.resolve() and path.name.startswith("tensor")
    if taken or path.name in _COMPANIONS:
        raise CheckpointError(f"{manifest} is the name of a checkpoint file; choose another name for the manifest")
    if path.is_dir():
        raise CheckpointError(f"{manifest} is a directory, expected a file name for the manifest")


def _listed_files(report: Report) -> dict[str, Path]:
    """Every file that a manifest of the checkpoint lists, by its name there."""
    folder = report.directory
    names = [f"{folder.name}/{spec.file_name}" for spec in report.structure.table]
    names += [f"{folder.name}/{name}" for name in _COMPANIONS if (folder / name).is_file()]
    names += [name for name in _COMPANIONS if (folder.parent / name).is_file()]
    return {name: folder.parent / name for name in names}


def _write_manifest(report: Report, manifest: Path, progress: StageProgress | None) -> None:
    paths = _listed_files(report)
    try:
        with HashCache(manifest, report.directory, required=True) as cache:
            report.resumed = len(cache.known(paths))
            entries: dict[str, Entry] = {}
            with contextlib.closing(hash_files(paths, cache, _stage("hashing", progress))) as hashed:
                for name, found in hashed:
                    if isinstance(found, str):
                        raise CheckpointError(f"{paths[name]} {found}; restore the file and run the command again")
                    entries[name] = found
            write_manifest(manifest, {name: entries[name] for name in paths}, report.directory.name)
    except OSError as error:
        raise cannot_write(manifest, error) from None


def _check_manifest(report: Report, manifest: Path, entries: dict[str, Entry], progress: StageProgress | None) -> None:
    reported = {fault.file for fault in report.faults}
    wanted: dict[Path, tuple[str, Entry]] = {}
    for name, entry in entries.items():
        _, other = wanted.setdefault(locate(name, report.directory), (name, entry))
        if other != entry:
            raise CheckpointError(
                f"{manifest} lists {name} twice with different hashes; correct it or get the manifest again"
            )
    for path in _listed_files(report).values():
        name = _short(path, report.directory)
        if path not in wanted and name not in reported:
            advice = "get a manifest of the whole checkpoint"
            fault = FileFault(name, "is not in the manifest and was not checked", advice, fetch=False)
            (report.warnings if path.name in _COMPANIONS else report.faults).append(fault)
    paths = {name: path for path, (name, _) in wanted.items()}
    # The directory of the manifest may be read-only; an interrupted run is not resumed then.
    with HashCache(manifest, report.directory, required=False) as cache:
        report.resumed = len(cache.known(paths))
        with contextlib.closing(hash_files(paths, cache, _stage("hashing", progress))) as hashed:
            results = dict(hashed)
    owners = {entry.sha256: path for path, (_, entry) in wanted.items()}
    present = {found.sha256 for found in results.values() if isinstance(found, Entry)}
    for path, (listed_name, expected) in wanted.items():
        name, found = _short(path, report.directory), results[listed_name]
        clause = _hash_mismatch(found, expected)
        if clause is None or name in reported:  # one line a file
            continue
        fetch, advice = True, "download it" if clause == "is missing" else _AGAIN
        owner = owners.get(found.sha256) if isinstance(found, Entry) else None
        if owner is not None:
            clause = f"has the contents of {_short(owner, report.directory)}, by its SHA-256"
            if expected.sha256 in present:
                fetch, advice = False, "rename the files"
        report.faults.append(FileFault(name, clause, advice, fetch))


def _hash_mismatch(found: Entry | str, expected: Entry) -> str | None:
    if isinstance(found, str):
        return found
    if expected.size is not None and found.size != expected.size:
        return f"has {found.size:,} bytes, expected {expected.size:,}"
    if found.sha256 != expected.sha256:
        return f"has SHA-256 {found.sha256[:12]}…, expected {expected.sha256[:12]}…"
    return None


def _short(path: Path, directory: Path) -> str:
    """A tensor file's name; another file's path relative to the parent folder."""
    return path.name if path.parent == directory else path.relative_to(directory.parent).as_posix()


def _stage(text: str, progress: StageProgress | None) -> ByteProgress | None:
    return None if progress is None else functools.partial(progress, text)

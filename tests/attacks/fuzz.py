"""Mutated files, many of them: each is read and used, or refused by an error of ours.

    python tests/attacks/fuzz.py --n 100000 --seed 0

Each file follows from its number and the seed, so one that is named can be made again. They are
read in a process of its own, which may take 512 MiB more than when it began; whoever watches it
sees a crash, or a file that takes longer than 2 s, and goes on with the next one.
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from hostile import CLASSES, FEATURES, a_model, archive, joined, npy, saved, signed
from hostile import parts as parts_of

MOST_SECONDS, MOST_BYTES = 2.0, 512 * 2**20
SLACK = 30  # seconds to start a process

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64 - 1, 10**30, 0.5, 1e308, float("nan")),
    *("", "a", "F32", "x" * 1000, "\x00", "\x1b[2J", "\ud800", "../x", [], {}, [[]], [0], {"a": 0}),
]
PIECES = [
    *(b"", b"\0", b"\xff", b"\n", b",", b'"', b"'", b";", b"\t", b"[", b"{", b"}", b"(", b"-"),
    *(b"nan", b"inf", b"1e999", b"9" * 30, b"1_0", b"true", b"\xef\xbb\xbf", b"\r", b"0x", b"\\u"),
    *(b"None", b"'|O'", b"'<U9'", b"<f8", b"\xff" * 8, b"PK\x05\x06", b"[" * 3000, b"1," * 300),
]


def _peak() -> int:
    """Return the most memory that this process has had; getrusage counts its parent's as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def with_bytes(raw: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A file with some bytes changed, removed, added, repeated, or taken from another."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + rng.choice([0, 1, 2, 4, 8, 64, 1000]))
        match rng.randrange(9):
            case 0 if data:
                data[i % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[i % len(data)] = rng.randrange(256)
            case 2:
                data[i:j] = rng.choice(PIECES)
            case 3:
                del data[i:j]
            case 4:
                data[i:i] = data[i:j] * rng.choice([1, 2, 50])
            case 5:
                data[i:] = b""
            case 6:
                other = rng.choice(others)
                k = rng.randrange(len(other))
                data[i:j] = other[k : k + j - i + rng.randrange(9)]
            case 7:
                number = rng.choice([0, 1, -1, 2**31 - 1, 2**31, rng.getrandbits(32)])
                size = rng.choice("bhiq")
                bits = 8 * struct.calcsize(size)
                data[i : i + bits // 8] = (number % 2**bits).to_bytes(bits // 8, "little")
            case _:  # a number written in digits
                digits = [k for k in range(len(data)) if data[k] in b"0123456789"]
                if digits:
                    k = rng.choice(digits)
                    data[k : k + 1] = rng.choice([b"9" * 20, b"-1", b"0", b"", b"1e9", b"7.5"])
    return bytes(data)


def with_value(tree: Any, rng: random.Random) -> Any:
    """JSON with one value, somewhere, exchanged, removed, repeated or renamed."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return rng.choice(VALUES)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, copy = rng.choice(keys), tree.copy()
    match rng.randrange(12):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[str(rng.choice(VALUES))] = copy.pop(key)
        case 1:
            copy.append(copy[key])
        case _:
            copy[key] = with_value(copy[key], rng)
    return copy


def with_arrays(arrays: dict[str, np.ndarray], rng: random.Random) -> dict[str, np.ndarray]:
    """Arrays of which one has another value, shape, type or name."""
    copy = dict(arrays)
    name = rng.choice(list(copy))
    match rng.randrange(6):
        case 0:
            array = copy[name].copy()
            array.reshape(-1)[rng.randrange(array.size)] = rng.choice(
                [np.nan, np.inf, -np.inf, 1e30, -1e30, 0, -1]
            )
            copy[name] = array
        case 1:
            copy[name] = copy[name].astype(rng.choice(["f2", "f4", "f8", "i4", "u1", "?"]))
        case 2:
            copy[name] = np.resize(copy[name], rng.choice([(), (0,), (1,), (3,), (1, 3), (4, 3)]))
        case 3:
            copy[rng.choice(["", "a/b", "preprocessing.mean", "weights"])] = copy.pop(name)
        case 4:
            del copy[name]
        case _:
            pass
    return copy


# --- models: whatever a safetensors file is read for -------------------------------------------


class Models:
    """Model files and checkpoints, and what is done with them."""

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load

        from gpuml import Linear
        from gpuml.checkpoints import KEY, save_checkpoint

        self.folder, self.checkpoint_key = folder, KEY
        self.facts = {"seed": 0}
        files = {"classes": a_model(), "numbers": a_model(y=FEATURES, dtype=np.float64)}
        files |= {"linear": Linear(3, 2, device="cpu"), "truth": a_model(y=CLASSES == "a")}
        for name, model in files.items():
            model.save(folder / name)
        state = {"best": [0.5, 1], "columns": {"epoch": [1, 2], "loss": [0.5, 0.25]}}
        state["generator"] = np.random.default_rng(0).bit_generator.state
        weights = {"weights": np.linspace(0, 1, 9), "flags": np.array([True, False])}
        save_checkpoint(folder / "run", arrays=weights, state=state, facts=self.facts)
        self.raw = {name: (folder / name).read_bytes() for name in [*files, "run"]}
        self.arrays = {name: load(raw) for name, raw in self.raw.items()}

    def make(self, rng: random.Random) -> tuple[str, bytes]:
        """A file, and which kind of file it was made from."""
        name = rng.choice(list(self.raw))
        raw, key = self.raw[name], self.checkpoint_key if name == "run" else "gpuml"
        match rng.randrange(4):
            case 0:
                return name, with_bytes(raw, rng, list(self.raw.values()))
            case 1:
                n = int.from_bytes(raw[:8], "little")
                header = with_bytes(raw[8 : 8 + n], rng, list(self.raw.values()))
                return name, joined(header, raw[8 + n :])
            case 2:
                n = int.from_bytes(raw[:8], "little")
                return name, joined(with_value(json.loads(raw[8 : 8 + n]), rng), raw[8 + n :])
            case _:  # with the right checksum
                description, arrays = parts_of(raw, key)[1], self.arrays[name]
                if rng.random() < 0.7:
                    description = with_value(description, rng)
                if rng.random() < 0.5 or not isinstance(description, dict):
                    arrays = with_arrays(arrays, rng)
                return name, signed(arrays, description, key)

    def read(self, name: str, raw: bytes) -> None:
        """Read a file, and use what was accepted."""
        from gpuml import load_model, predict
        from gpuml.checkpoints import load_checkpoint, saved_facts

        path = self.folder / "mutated"
        path.write_bytes(raw)
        if name == "run":
            saved_facts(path)
            load_checkpoint(path, self.facts)
            return
        model = load_model(path, device="cpu")
        assert np.isfinite(model.parameters.flat).all()
        X = FEATURES
        if model.preprocessing is not None:
            assert len(repr(model.preprocessing)) < 3000
            X = model.preprocessing.features(X)
        with np.errstate(all="ignore"):
            outputs = predict(model, X)
        assert outputs.shape == (4, model.sizes[-1])
        if model.preprocessing is not None:
            with np.errstate(all="ignore"):
                assert len(model.preprocessing.answers(outputs)) == 4


# --- data --------------------------------------------------------------------------------------


class Data:
    """Tables, arrays, archives, records of products and recordings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = [(i, i * i % 7, "ab"[i % 2]) for i in range(12)]
        body = "".join(f"{a},{b / 4},{c}\n" for a, b, c in rows)
        numbers = "".join(f"{a};{'true' if b > 3 else 'False'};{b}\n" for a, b, _ in rows)
        y, names = np.array([0.0, 1, 0, 1]), np.array(["é", "b", "é", "b"])
        self.arrays = {"X": FEATURES.astype("f4"), "y": y}
        self.out = np.lib.format.open_memmap(folder / "out.npy", "w+", float, (4, 3))
        self.out[...] = FEATURES
        from gpuml import recordings
        from gpuml.journal import Journal

        self.facts = {"a": "4x3", "precision": None}
        journal = Journal(folder / "record", self.out, self.facts, resume=False)
        journal.add((0, 2, 0, 3))
        journal.add((2, 4, 0, 3))
        recording = json.loads(
            (Path(recordings.__file__).parent / "recorded" / "nvidia_h200.json").read_text()
        )
        recording["products"]["rows"] = recording["products"]["rows"][:4]
        recording |= {"peers": {}, "blocked": {"tall": recording["blocked"]["tall"]}}
        for kind, spans in recording["blocked"]["tall"]["spans"].items():
            recording["blocked"]["tall"]["spans"][kind] = spans[:3]
        self.recording = recording
        members = {f"{name}.npy": saved(a) for name, a in self.arrays.items()}
        self.raw = {
            "header.csv": ("a,b,kind\n" + body).encode(),
            "plain.csv": body.encode(),
            "numbers.csv": ('"a";b;y\n' + numbers).encode("utf-8-sig"),
            "X.npy": saved(FEATURES),
            "F.npy": saved(np.asfortranarray(FEATURES.astype(">i4"))),
            "stored.npz": archive(members),
            "packed.npz": archive(members | {"y.npy": saved(names)}, zipfile.ZIP_DEFLATED),
            "record": (folder / "record").read_bytes(),
            "recording.json": json.dumps(recording).encode(),
        }

    def make(self, rng: random.Random) -> tuple[str, bytes]:
        """A file, and its name."""
        name = rng.choice(list(self.raw))
        raw, others = self.raw[name], [r for n, r in self.raw.items() if n != "recording.json"]
        if name == "recording.json" and rng.random() < 0.8:
            return name, json.dumps(with_value(self.recording, rng)).encode()
        if name.endswith(".npz") and rng.random() < 0.7:  # with the right checksums
            with zipfile.ZipFile(io.BytesIO(raw)) as file:
                members = {n: file.read(n) for n in file.namelist()}
            changed = rng.choice(list(members))
            members[changed] = self._array(members[changed], rng, others)
            method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
            return name, archive(members, method)
        if name.endswith(".npy"):
            return name, self._array(raw, rng, others)
        return name, with_bytes(raw, rng, others)

    def _array(self, raw: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
        if rng.random() < 0.3:
            return with_bytes(raw, rng, others)
        if rng.random() < 0.2:
            shape = rng.choice([(), (4,), (0, 3), (4, 0), (2, 2, 2), (5, 3)])
            types = ["f2", "f8", ">f4", "i1", "u8", "?", "U3", "S2", "c8", "M8[s]", "O", "f16"]
            return saved(np.zeros(shape, rng.choice(types)))
        n = int.from_bytes(raw[8:10], "little")
        header = raw[10 : 10 + n].strip()
        return npy(with_bytes(header, rng, others), raw[10 + n :])

    def read(self, name: str, raw: bytes) -> None:
        """Read a file, and use what was accepted."""
        from gpuml import load_dataset
        from gpuml.datasets import Preprocessing
        from gpuml.journal import Journal
        from gpuml.recordings import recorded

        path = self.folder / f"mutated{Path(name).suffix}"
        path.write_bytes(raw)
        if name == "record":
            Journal(path, self.out, self.facts, resume=True)
            return
        if name == "recording.json":
            assert str(recorded(path))
            return
        data = load_dataset(path)
        assert data.X.dtype == np.float64
        assert np.isfinite(data.X).all()
        if data.y is not None:
            Preprocessing.fit(data.X, data.y, data.task, feature_names=data.feature_names)


class Traps:
    """Files that do what none may do, to see that it is seen."""

    def __init__(self, folder: Path) -> None:
        self.number = -1  # of the file; set from outside
        self.raw: dict[str, bytes] = {}

    def make(self, rng: random.Random) -> tuple[str, bytes]:
        """Nothing is needed."""
        return "trap", b""

    def read(self, name: str, raw: bytes) -> None:
        """Fail in a way that depends on the number."""
        from gpuml.errors import DataError

        match self.number:
            case 1:
                raise ValueError("not ours")
            case 2:
                raise DataError("of ours, of two\nlines")
            case 3:
                np.ones(MOST_BYTES // 8 + 2**22)  # 32 MiB more: some may have become free
            case 4:
                os.abort()
            case 5:
                time.sleep(60)
        raise DataError("refused, as it should be")


KINDS: dict[str, Callable[[Path], Models | Data | Traps]] = {
    "models": Models,
    "data": Data,
    "traps": Traps,
}


# --- the process that reads --------------------------------------------------------------------


def _made(source: Any, number: int, rng: random.Random) -> tuple[str, bytes]:
    """A file that can be written: safetensors and zipfile keep no half characters."""
    source.number = number
    while True:
        with suppress(UnicodeEncodeError):
            made: tuple[str, bytes] = source.make(rng)
            return made


def read_all(kind: str, start: int, stop: int, seed: int, board: Path) -> None:
    """Read files one after the other; say on the board which one it is."""
    import resource

    from gpuml.errors import GpumlError

    warnings.simplefilter("ignore")
    shown = mmap.mmap(os.open(board, os.O_RDWR), 0)
    with tempfile.TemporaryDirectory() as name:
        source = KINDS[kind](Path(name))
        for made, raw in source.raw.items():  # what is imported late is imported now
            with suppress(GpumlError):
                source.read(made, raw)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, now + MOST_BYTES))
        report: dict[str, Any] = {"refused": 0, "used": 0, "longest": 0.0, "longest_file": -1}
        faults: list[str] = []
        for number in range(start, stop):
            made, raw = _made(source, number, random.Random(f"{seed} {kind} {number}"))
            shown[:16] = struct.pack("qd", number, time.monotonic())
            begin = time.perf_counter()
            try:
                source.read(made, raw)
                report["used"] += 1
            except GpumlError as error:
                report["refused"] += 1
                message = str(error)
                if not message.isprintable() or not 10 < len(message) < 1200:
                    faults.append(f"{kind} {number} ({made}): message {message[:300]!r}")
            except BaseException:
                faults.append(f"{kind} {number} ({made}): {traceback.format_exc()}")
            seconds = time.perf_counter() - begin
            if seconds > report["longest"]:
                report |= {"longest": seconds, "longest_file": number}
        usage = _peak()
        shown[:16] = struct.pack("qd", stop, 0.0)
        print(json.dumps(report | {"faults": faults, "peak": usage}))


# --- the one that watches ----------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of many files."""

    refused: int = 0
    used: int = 0
    longest: float = 0.0
    longest_file: int = -1
    peak: int = 0
    faults: list[str] = field(default_factory=list)


def fuzz(kind: str, n: int, seed: int, *, batch: int = 5000) -> Outcome:
    """Have n files read in processes of their own, and watch them."""
    outcome, start = Outcome(), 0
    while start < n:
        start = _watch(kind, start, min(n, start + batch), seed, outcome)
    return outcome


def _watch(kind: str, start: int, stop: int, seed: int, outcome: Outcome) -> int:
    """Watch one process; return where to go on."""
    with tempfile.TemporaryDirectory() as name:
        board = Path(name, "board")
        board.write_bytes(struct.pack("qd", -1, 0.0).ljust(mmap.PAGESIZE, b"\0"))
        command = [sys.executable, __file__, "--read", kind, str(start), str(stop), str(board)]
        with (
            Path(name, "out").open("w+") as out,
            subprocess.Popen(
                [*command, "--seed", str(seed)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            ) as process,
        ):
            begin = time.monotonic()
            while process.poll() is None:
                time.sleep(0.05)
                number, since = struct.unpack("qd", board.read_bytes()[:16])
                limit = MOST_SECONDS if since else SLACK
                if time.monotonic() - (since or begin) > limit and number < stop:
                    process.kill()
                    process.wait()
                    outcome.faults.append(f"{kind} {number}: over {limit} s")
                    return max(start, number) + 1
            out.seek(0)
            text = out.read()
        if process.returncode != 0:
            number = struct.unpack("qd", board.read_bytes()[:16])[0]
            outcome.faults.append(f"{kind} {number}: exit {process.returncode}: {text[-2000:]}")
            return max(start, number) + 1
    report = json.loads(text.splitlines()[-1])
    outcome.refused += report["refused"]
    outcome.used += report["used"]
    if report["longest"] > outcome.longest:
        outcome.longest, outcome.longest_file = report["longest"], report["longest_file"]
    outcome.peak = max(outcome.peak, report["peak"])
    outcome.faults += report["faults"]
    return stop


def main() -> int:
    """Read many files of both kinds and print what became of them."""
    parser = argparse.ArgumentParser(description="Read mutated files, and say what became of them.")
    parser.add_argument("--n", type=int, default=100_000, help="files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), help="of one kind only")
    parser.add_argument("--read", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        kind, start, stop, board = options.read
        read_all(kind, int(start), int(stop), options.seed, Path(board))
        return 0
    failed = False
    for kind in [options.kind] if options.kind else ("models", "data"):
        begin = time.perf_counter()
        outcome = fuzz(kind, options.n, options.seed)
        print(
            f"{kind}: {options.n:,} files in {time.perf_counter() - begin:.0f} s: "
            f"{outcome.refused:,} refused, {outcome.used:,} used; the longest took "
            f"{outcome.longest * 1e3:.0f} ms (number {outcome.longest_file}); "
            f"{outcome.peak / 2**20:.0f} MiB at most; {len(outcome.faults)} faults",
            flush=True,
        )
        for fault in outcome.faults[:20]:
            print(fault)
        failed |= bool(outcome.faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

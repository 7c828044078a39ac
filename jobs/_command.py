"""`latentloom`: every job as one command, beside `python -m jobs.NAME`, and what else a newcomer asks for.

    latentloom JOB CONFIG... [key=value ...]     the job, as `python -m jobs.JOB` runs it
    latentloom init IMAGES [--out encode.yaml] [--codec PATH]
    latentloom files URI [--format jsonl | duckdb | polars]
    latentloom browse URI [--codec PATH] [--with URI] [--tracking URI] [--port NUMBER]
    latentloom configs list | show NAME | copy NAME [DEST]
    latentloom completion bash | zsh | fish
    latentloom --help | --version

Light: none of these but the jobs themselves imports Ray, torch or MLflow (`browse` the latter two, where a page needs
them), and none but `init` and `browse` an image library.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import pkgutil
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import yaml

import jobs
from jobs._main import EXIT_CODES, Job, Parser, main, reported
from pipeline.config import SHIPPED, StrictModel, field_tree, validate
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.source.config import IMAGE_ENDINGS

if TYPE_CHECKING:
    from pipeline.store.read.dataset import DataFile

# The journey's stages, with the jobs of each in the order they are met.
STAGES = {
    "try it": ("quickstart",),
    "prepare": ("fit_codec", "encode", "embed_text", "compact", "forget", "verify"),
    "train": ("train", "ema"),
    "use": ("sample", "regenerate", "evaluate", "promote", "export"),
    "look after": ("lineage", "sync_tracking"),
}
HELPERS = {
    "init": "look at some images and write a configuration for encode that fits them, with the reasons as comments",
    "files": "print the files of a dataset and which of their rows are visible, for readers that know Parquet alone",
    "browse": "show a dataset in a browser on this machine: pictures, what was left out and why, where it came from",
    "configs": "list, show or copy the configurations that come with the package",
    "completion": "print the completion of this command for bash, zsh or fish",
}
_JOB_FLAGS = ("--dry-run", "--print-config", "--help")


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """The console command; exits as the job does, or 0, or with code 2 for what it does not know."""
    words = list(sys.argv[1:] if argv is None else argv)
    with reported("latentloom"):
        name = words[0] if words else "--help"
        said = None
        if name in ("--help", "-h", "help"):
            said = _overview()
        elif name == "--version":
            said = "latentloom (a checkout that is not installed)"
            with suppress(metadata.PackageNotFoundError):
                said = f"latentloom {metadata.version('latentloom')}"
        elif name in HELPERS:
            said = _HELPER_OF[name](words[1:])
        if said is not None:
            try:
                print(said, end="\n" if said else "", flush=True)
            except BrokenPipeError:  # whoever reads has read enough, as `head` does
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        if name not in job_names():
            raise _unknown("command", name, [*job_names(), *HELPERS], "latentloom --help lists all of them")
    module = importlib.import_module(f"jobs.{name}")
    if not hasattr(module, "JOB"):  # the quickstart, which runs several
        module.main(words[1:])
    main(module.JOB, words[1:], prog=f"latentloom {name}")


def job_names() -> tuple[str, ...]:
    """Every job there is, in the order of the journey; one of no stage comes last."""
    there = sorted(found.name for found in pkgutil.iter_modules(jobs.__path__) if not found.name.startswith("_"))
    staged = [name for names in STAGES.values() for name in names]
    return (*(name for name in staged if name in there), *(name for name in there if name not in staged))


def _summary(name: str) -> str:
    module = importlib.import_module(f"jobs.{name}")
    job: Job | None = getattr(module, "JOB", None)
    return job.summary if job else str(module.__doc__).partition("\n")[0].partition(": ")[2].capitalize()


def _overview() -> str:
    names = job_names()
    staged = {name for stage in STAGES.values() for name in stage}
    stages = {**STAGES, "other": tuple(name for name in names if name not in staged)}
    lines = ["usage: latentloom COMMAND ...\n\nImages to VAE latents to a trained diffusion model to images.\n"]
    for stage, members in stages.items():
        there = [name for name in members if name in names]
        if there:
            lines += [f"{stage}:", *(f"  {name:<14} {_summary(name)}" for name in there), ""]
    lines += ["besides:", *(f"  {name:<14} {what}" for name, what in HELPERS.items()), ""]
    lines.append("latentloom JOB --help prints every key of a job; python -m jobs.JOB is the same.\n")
    return "\n".join([*lines, EXIT_CODES])


def _unknown(what: str, value: str, known: Sequence[str], next_step: str) -> ConfigError:
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(
        f"There is no such {what}{hint}", key=what, value=value, rule=", ".join(known), next_step=next_step
    )


# -- Configurations that come with the package -----------------------------------------------------------------


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by their names: folder/stem."""
    return {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in sorted(SHIPPED.glob("*/*.yaml"))}


def configurations(words: Sequence[str]) -> str:
    """What `latentloom configs` prints."""
    parser = Parser(prog="latentloom configs", description=HELPERS["configs"], allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="list | show NAME | copy NAME [DEST]")
    actions.add_parser("list", help="one line for each")
    actions.add_parser("show", help="print one").add_argument("name")
    copying = actions.add_parser("copy", help="put one into DEST, a folder or a file; here by default")
    copying.add_argument("name")
    copying.add_argument("destination", nargs="?", default=".")
    arguments = parser.parse_args(words)
    files = shipped()
    if arguments.action == "list":
        lines = []
        for name, path in files.items():
            # What each is for: the first sentence of its comment.
            comment = takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines())
            purpose = " ".join(line[2:].strip() for line in comment).partition(". ")[0].rstrip(".")
            lines.append(f"{name:<26} {purpose}")
        return "\n".join(lines)
    name = arguments.name.removeprefix("configs/").removesuffix(".yaml")
    if name not in files:
        raise _unknown("configuration", name, list(files), "latentloom configs list says what each is for")
    if arguments.action == "show":
        return files[name].read_text(encoding="utf-8").rstrip("\n")
    source, destination = files[name], Path(arguments.destination)
    target = destination / source.name if destination.is_dir() else destination
    return str(_put_new(target, source.read_text(encoding="utf-8"), "DEST"))


def _put_new(target: Path, text: str, key: str) -> Path:
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConflictError(
            "The file is there already: nothing was changed",
            key=key,
            value=target,
            rule="this command replaces nothing: what is there may be somebody's own",
            next_step="name another file or folder, or move that one away",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"The configuration cannot be written: {error.strerror}",
            key=key,
            value=target,
            rule="an existing folder, or a file to be made in one",
            next_step="make the folder, or name another one",
        ) from None
    return target


# -- A configuration that fits some images ---------------------------------------------------------------------


_LISTED, _OPENED = 20_000, 100  # of a large folder the first are listed, and of these some opened
_IMAGES = tuple(f".{ending}" for ending in IMAGE_ENDINGS)
_SIDES = (1024, 768, 512, 384, 256, 128, 64, 32)


def init(words: Sequence[str]) -> str:
    """Write a configuration for encode that fits a folder, tars or Parquet files; returns what to do with it."""
    parser = Parser(prog="latentloom init", description=HELPERS["init"], allow_abbrev=False)
    parser.add_argument("images", metavar="IMAGES", help="a folder of images, of .tar files or of .parquet files")
    parser.add_argument("--out", default="encode.yaml", help="the file to write (encode.yaml); none is replaced")
    parser.add_argument("--codec", help="the VAE: a diffusers AutoencoderKL directory")
    arguments = parser.parse_args(words)
    from pipeline.encode.config import EncodeJobConfig
    from pipeline.storage.root import Root

    name = re.sub(r"[^\w.-]+", "_", arguments.images.rstrip("/").rpartition("/")[2]) or "images"
    codec = arguments.codec or f"runs/{name}/codec"
    names = [info.key.lower() for info in islice(Root(arguments.images).list(), _LISTED)]
    source: list[tuple[str, object, str]] = [("uri", arguments.images, "")]
    source.append(("name", name, "goes into every row's id: keep it when the images move"))
    looked = f"{len(names):,}{' and more' if len(names) == _LISTED else ''} files"
    image: list[tuple[str, object, str]] = []
    if any(key.endswith(".tar") for key in names):
        source.insert(0, ("kind", "webdataset", "members of one basename are a sample: .jpg with .txt, .cls, .json"))
    elif any(key.endswith(".parquet") for key in names) and not any(key.endswith(_IMAGES) for key in names):
        source.insert(0, ("kind", "parquet", "set image, caption and label to the names of its columns"))
    else:
        source.insert(0, ("kind", "folder", ""))
        looked = _fit_folder(arguments.images, names, source, image)
    if not image:
        image = [("resolution", 256, "not looked at: images are enlarged by at most image.max_upscale")]
    image.append(("multiple_of", 8, "the codec's factor"))
    sections: dict[str, list[tuple[str, object, str]]] = {
        "source": source,
        "image": image,
        "codec": [("path", codec, "a diffusers AutoencoderKL directory, or a hub id with codec.revision")],
        "output": [("uri", f"runs/{name}/latents", "")],
    }
    lines = [f"# For latentloom encode: written by latentloom init after a look at {looked}.", ""]
    for section, entries in sections.items():
        lines.append(f"{section}:")
        for key, value, why in entries:
            lines.append(f"  {key}: {json.dumps(value, ensure_ascii=False)}" + (f"  # {why}" if why else ""))
    text = "\n".join(lines) + "\n"
    validate(EncodeJobConfig, yaml.safe_load(text))
    _put_new(Path(arguments.out), text, "--out")
    kind = f"source.kind={source[0][1]} source.uri={shlex.quote(arguments.images)}"
    steps = [] if arguments.codec else [f"latentloom fit_codec {kind} image.resolution=64 output.uri={codec}"]
    steps += [f"latentloom encode {arguments.out} --dry-run", f"latentloom encode {arguments.out}"]
    return "\n".join([f"{arguments.out} is written. Next:", *(f"  {step}" for step in steps)])


def _fit_folder(
    uri: str, names: Sequence[str], source: list[tuple[str, object, str]], image: list[tuple[str, object, str]]
) -> str:
    """Add what a folder's listing and the headers of some images tell; returns what was looked at."""
    from pipeline.source.config import FORMATS, MAX_PIXELS, FolderSource
    from pipeline.source.pixels.decode import DecodeLimits, open_image
    from pipeline.source.reading.listing import list_entries
    from pipeline.source.reasons import DecodeError
    from pipeline.storage.root import Root

    entries = list(islice(list_entries(FolderSource(uri=uri)), _LISTED))
    told = [json.loads(entry.meta) if entry.meta else {} for entry in entries]
    beside = {name.rpartition(".")[0] for name in names if name.endswith((".txt", ".caption", ".json"))}
    own = [entry.key.lower().rpartition(".")[0] in beside for entry in entries]
    count, captions = len(entries), sum(o or one.get("caption") is not None for o, one in zip(own, told, strict=True))
    labels = sum(one.get("label") is not None for one in told)
    if not captions:
        source.append(("caption", None, "none has one, in a .txt, a .json or a metadata file"))
    else:
        source.append(("caption", "text", f"{captions:,} of {count:,} have one"))
    folders = Counter(entry.key.rpartition("/")[0] for entry in entries)
    if labels:
        source.append(("label", "label", f"{labels:,} of {count:,} have one, in metadata"))
    elif len(folders) > 1 and min(folders.values()) > 1 and not any("/" in folder for folder in folders):
        few, many = min(folders.values()), max(folders.values())
        source.append(("label_from", "directory", f"{len(folders)} directories of {few:,} to {many:,} images"))
        source.append(("classes", sorted(folders), "in the order of their labels: add new ones at the end"))
    else:
        source.append(("label", None, "none has one"))
    sizes, limits = [], DecodeLimits(FORMATS, MAX_PIXELS, 10.0)
    opened = entries[:: max(1, count // _OPENED)][:_OPENED]
    for entry in opened:
        with suppress(DecodeError, OSError):
            sizes.append(open_image(Root(uri).read_bytes(entry.key), limits).size)
    if sizes:
        short = sorted(min(size) for size in sizes)
        least, median = short[len(short) // 10], short[len(short) // 2]
        side = next((side for side in _SIDES if side <= least), _SIDES[-1])
        why = f"nine of ten of {len(sizes)} opened have a short side of {least} or more, half of {median}"
        image.append(("resolution", side, why))
        cut = sum(1 - min(size) / max(size) for size in sizes) / len(sizes)
        if cut > 0.15:
            image.append(("buckets", {"kind": "budget"}, f"squares would cut away {cut:.0%} of an image by the mean"))
    unread = f", of which {len(opened) - len(sizes)} cannot be read" if len(sizes) < len(opened) else ""
    return f"{count:,}{' and more' if count == _LISTED else ''} images, {len(opened)} of them opened{unread}"


# -- What is visible in a dataset, for DuckDB, Polars and whoever else reads Parquet ---------------------------


def print_files(words: Sequence[str]) -> str:
    """The files of a dataset and which of their rows are visible, in the form that was asked for."""
    parser = Parser(prog="latentloom files", description=HELPERS["files"], allow_abbrev=False)
    parser.add_argument("uri", metavar="URI", help="the dataset: latents, embeddings or images")
    parser.add_argument("--format", choices=list(_READERS), default="jsonl", help="lines of JSON, or a query")
    arguments = parser.parse_args(words)
    from pipeline.storage.root import Root
    from pipeline.store.ledger.identity import read_identity
    from pipeline.store.read.dataset import Dataset

    kind = read_identity(Root(arguments.uri), "URI").kind
    files: list[DataFile] = Dataset.open_kind(arguments.uri, kind, "URI").files()
    if not files:
        raise InputError(
            "The dataset has no visible row",
            key="URI",
            value=arguments.uri,
            rule="what no commit has made visible is not there for others",
            next_step="run the job that writes it to its end",
        )
    return _READERS[arguments.format](files)


def as_jsonl(files: Sequence[DataFile]) -> str:
    """One JSON object a file."""
    return "\n".join(
        json.dumps({"uri": f.uri, "rows": f.num_rows, "size_bytes": f.size_bytes, "filter": f.row_filter})
        for f in files
    )


def _by_filter(files: Sequence[DataFile]) -> dict[str | None, list[str]]:
    """URIs by what is visible in them: those that are visible as a whole are read by one call."""
    grouped: dict[str | None, list[str]] = {}
    for file in files:
        grouped.setdefault(file.row_filter, []).append(file.uri)
    return grouped


def as_duckdb(files: Sequence[DataFile]) -> str:
    """A query for DuckDB."""
    parts = []
    for condition, uris in _by_filter(files).items():
        listed = ", ".join("'" + uri.replace("'", "''") + "'" for uri in uris)
        parts.append(f"SELECT * FROM read_parquet([{listed}])" + (f" WHERE {condition}" if condition else ""))
    return "\nUNION ALL BY NAME\n".join(parts) + ";"


def as_polars(files: Sequence[DataFile]) -> str:
    """A script for Polars."""
    parts = [
        f"    pl.scan_parquet({uris!r})" + (f".filter(pl.sql_expr({condition!r}))" if condition else "")
        for condition, uris in _by_filter(files).items()
    ]
    return "\n".join(["import polars as pl", "", "rows = pl.concat([", ",\n".join(parts), "])"])


_READERS: dict[str, Callable[[Sequence[DataFile]], str]] = {
    "jsonl": as_jsonl,
    "duckdb": as_duckdb,
    "polars": as_polars,
}


# -- A dataset as pages of a browser ---------------------------------------------------------------------------


def browse(words: Sequence[str]) -> str:
    """Serve pages until the terminal says that it is enough."""
    parser = Parser(prog="latentloom browse", description=HELPERS["browse"], allow_abbrev=False)
    parser.add_argument("uri", metavar="URI", help="the dataset: latents, embeddings or samples")
    parser.add_argument("--codec", metavar="PATH", help="the codec of the latents: pictures instead of false colours")
    parser.add_argument(
        "--with", dest="beside", metavar="URI", help="samples of another run, beside those of equal seeds"
    )
    parser.add_argument("--tracking", metavar="URI", help="the tracking.uri of its jobs (sqlite:///mlflow.db)")
    parser.add_argument(
        "--port", type=int, metavar="NUMBER", help="of this machine's loopback; by default a free one"
    )
    arguments = parser.parse_args(words)
    from pipeline.browse import PageServer, serve
    from pipeline.tracking.config import TrackingConfig

    def ready(server: PageServer) -> None:
        print(f"Only this machine is answered, and only at this address, until Ctrl-C:\n{server.address}", flush=True)

    tracking = arguments.tracking or TrackingConfig().uri
    with suppress(KeyboardInterrupt):
        serve(
            arguments.uri,
            codec=arguments.codec,
            beside=arguments.beside,
            tracking=tracking,
            port=arguments.port,
            ready=ready,
        )
    return ""


# -- Completion, printed from the list of jobs and the fields of their configurations --------------------------


def completion(words: Sequence[str]) -> str:
    """The script that a shell evaluates."""
    parser = Parser(prog="latentloom completion", description=HELPERS["completion"], allow_abbrev=False)
    parser.add_argument("shell", choices=list(_SHELLS))
    return _SHELLS[parser.parse_args(words).shell]()


def _actions() -> dict[str, list[str]]:
    """What may follow each command: of a job its flags and the keys that take a value."""
    found = {
        "init": ["--out", "--codec"],
        "files": ["--format"],
        "browse": ["--codec", "--with", "--tracking", "--port"],
        "configs": ["list", "show", "copy", *shipped()],
        "completion": list(_SHELLS),
    }
    for name in job_names():
        job: Job | None = getattr(importlib.import_module(f"jobs.{name}"), "JOB", None)
        found[name] = ["--help"]
        if job is not None:
            module, _, attribute = job.config.partition(":")
            model: type[StrictModel] = getattr(importlib.import_module(module), attribute)
            keys = dict.fromkeys(key for key, kind, _ in field_tree(model) if kind != "section")
            found[name] = [*_JOB_FLAGS, *(f"{key}=" for key in keys)]
    return found


def for_bash() -> str:
    """The completion for bash."""
    cases = "\n".join(f"    {name}) words={shlex.quote(' '.join(after))} ;;" for name, after in _actions().items())
    # bash ends a word at "=": what stands behind it is completed as a file's name.
    return f"""\
# latentloom for bash: eval "$(latentloom completion bash)"
_latentloom() {{
  local words="{" ".join([*job_names(), *HELPERS, "--help", "--version"])}"
  if [ "$COMP_CWORD" -gt 1 ]; then
    case "${{COMP_WORDS[1]}}" in
{cases}
    *) words="" ;;
    esac
  fi
  local current="${{COMP_WORDS[COMP_CWORD]}}" word
  COMPREPLY=()
  [ "$current" = "=" ] || [ "${{COMP_WORDS[COMP_CWORD-1]}}" = "=" ] && return
  for word in $(compgen -W "$words" -- "$current"); do
    case "$word" in *=) COMPREPLY+=("$word") ;; *) COMPREPLY+=("$word ") ;; esac
  done
}}
complete -o default -o nospace -F _latentloom latentloom"""


def for_zsh() -> str:
    """The completion for zsh."""
    cases = "\n".join(
        f"    {name}) compadd -S '' -- {' '.join(word for word in after if word.endswith('='))}; "
        f"compadd -- {' '.join(word for word in after if not word.endswith('='))}; _files ;;"
        for name, after in _actions().items()
    )
    return f"""\
#compdef latentloom
# latentloom for zsh: eval "$(latentloom completion zsh)"
_latentloom() {{
  if (( CURRENT == 2 )); then
    compadd -- {" ".join([*job_names(), *HELPERS, "--help", "--version"])}
    return
  fi
  case "$words[2]" in
{cases}
  esac
}}
compdef _latentloom latentloom"""


def for_fish() -> str:
    """The completion for fish."""
    lines = ["# latentloom for fish: latentloom completion fish | source"]
    told = {**{name: _summary(name) for name in job_names()}, **HELPERS}
    for name, what in told.items():
        lines.append(f"complete -c latentloom -n __fish_use_subcommand -f -a {name} -d {_fish_quoted(what)}")
    for name, after in _actions().items():
        lines.append(
            f"complete -c latentloom -n '__fish_seen_subcommand_from {name}' -a {_fish_quoted(' '.join(after))}"
        )
    return "\n".join(lines)


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SHELLS: dict[str, Callable[[], str]] = {"bash": for_bash, "zsh": for_zsh, "fish": for_fish}
_HELPER_OF: dict[str, Callable[[Sequence[str]], str]] = {
    "init": init,
    "files": print_files,
    "browse": browse,
    "configs": configurations,
    "completion": completion,
}


if __name__ == "__main__":
    run()

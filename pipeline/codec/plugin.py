"""Third-party codecs: a Python entry point of the group `latentloom.codecs`, chosen by `codec.kind`.

A package offers its codec in its own metadata:

    [project.entry-points."latentloom.codecs"]
    mycodec = "mypackage.codec:plugin"

where `plugin` is any object with the two methods of `CodecPlugin`: `read_info`, which should import no torch
so that a dry run stays quick, and `load`, which returns a `pipeline.codec.codec.Codec`. Nothing in the
pipeline changes: `codec.kind=mycodec` selects it, `codec.path` and `codec.revision` are handed to it as
written. `weights_sha256` of its info must change when its weights do: the fingerprint rests on it.
"""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol, cast

from pipeline.codec.info import CodecInfo
from pipeline.errors import ConfigError, InputError

if TYPE_CHECKING:
    from pipeline.codec.codec import Codec

GROUP = "latentloom.codecs"


class CodecPlugin(Protocol):
    """What an entry point of the group must provide."""

    def read_info(self, path: str, revision: str | None) -> CodecInfo:
        """Identity and shape of the codec at `path`; InputError when it cannot be read."""
        ...

    def load(
        self,
        path: str,
        revision: str | None,
        info: CodecInfo,
        *,
        device: str,
        dtype: str,
        compile: bool,
        channels_last: bool,
    ) -> Codec:
        """The codec on `device`, in arithmetic `dtype` ("float32", "bfloat16" or "float16")."""
        ...


def find_plugin(kind: str) -> CodecPlugin:
    """The plug-in called `kind`; ConfigError when there is none, InputError when it cannot be imported."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    if kind not in found:
        near = difflib.get_close_matches(kind, [*found, "auto"], n=1)
        raise ConfigError(
            "There is no such codec plug-in",
            key="codec.kind",
            value=kind,
            rule=f"auto, or an installed entry point of {GROUP}: {', '.join(sorted(found)) or 'there is none'}",
            next_step=f"did you mean {near[0]}?" if near else "install the package that offers it, or use auto",
        )
    try:
        plugin = found[kind].load()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"The codec plug-in cannot be imported: {error}",
            key="codec.kind",
            value=kind,
            next_step=f"repair {found[kind].value}",
        ) from error
    missing = [name for name in ("read_info", "load") if not callable(getattr(plugin, name, None))]
    if missing:
        raise InputError(
            f"The codec plug-in {found[kind].value} lacks the method {' and '.join(missing)}",
            key="codec.kind",
            value=kind,
            rule="a plug-in has read_info(path, revision) and load(path, revision, info, ...)",
        )
    return cast(CodecPlugin, plugin)

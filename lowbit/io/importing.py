"""Other ecosystems' low-bit files into a native checkpoint: the same codes and scales, nothing rounded again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lowbit.arrays import Tensor
from lowbit.errors import CheckpointError
from lowbit.formats.spec import Spec
from lowbit.io.layout import Contents
from lowbit.io.native import Writer, parts_of
from lowbit.io.opening import REST, Group, LowBit
from lowbit.io.storage import storage
from lowbit.pipeline.recipe import Recipe, Step
from lowbit.pipeline.result import Finished, SiteReport


def import_low_bit(
    model: LowBit, out: Path, on_progress: Callable[[int, int], object] = lambda done, total: None
) -> bool:
    """Write a low-bit model of any layout as a native checkpoint; whether it was there already.

    Every QTensor as the layout's file holds it; other tensors keep their dtype. The manifest's recipe reads
    ``imported:LAYOUT`` and its source is the digest of the files. Killed, the same call goes on. ``on_progress`` is
    told of blocks. Raises CheckpointError and StorageError. Cost: reads the files once more and writes them once.
    """
    if model.origin == "lowbit":
        raise CheckpointError(
            "is a native checkpoint already", where=str(model.path), fix="lowbit export or convert, to another layout"
        )
    started, cpu = time.perf_counter(), time.process_time()
    writer = _Imported(out, model)
    with writer:
        if writer.already_done:
            return True
        resumed = any(writer.has(block) for block in model.source.blocks)
        for done, group in enumerate(model.groups()):
            writer.take(group)
            on_progress(done + 1, len(model.source.blocks) + 1)
        with storage(out):
            model.companions(out)
        writer.finish({
            "calibration_text": None, "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu, "resumed": resumed,
        })  # fmt: skip
    return False


class _Imported(Writer):
    """Writes finished groups instead of a walk's results."""

    def __init__(self, out: Path, model: LowBit) -> None:
        self._model, self._rest = model, Group(REST, {})
        recipe = Recipe(step=[Step(method="imported", format=model.origin)])
        super().__init__(out, model.source, recipe, None, identity=model.digest)

    def take(self, group: Group) -> None:
        """Write a block unless it is there; keep what belongs to none for the end."""
        if group.name == REST:
            self._rest = group
        elif not self.has(group.name):
            edited = {name: group.dense[name] for name in group.edited}
            reports = [_report(site, q.spec(), q.nbytes, self._model.origin) for site, q in group.codes.items()]
            module = self.source.skeleton.get_submodule(group.name)
            self.write(group.name, module, Finished(group.codes, group.inputs, edited, reports))

    def outside(self) -> tuple[dict[str, Tensor], Contents]:
        rest = self._rest
        contents = Contents(
            {site: q.spec() for site, q in rest.codes.items()}, {site: i.format for site, i in rest.inputs.items()},
            tuple(sorted(rest.edited)),
        )  # fmt: skip
        dense = {name: value.contiguous() for name, value in rest.dense.items()}
        return parts_of(rest.codes, rest.inputs) | dense, contents

    def narrowed(self, tensor: Tensor) -> Tensor:
        """As it came."""
        return tensor.contiguous()


def _report(site: str, spec: Spec, nbytes: int, origin: str) -> SiteReport:
    rows, columns = spec.shape
    return SiteReport(site, "imported", origin, nbytes, 8 * nbytes / (rows * columns), None, None, 0.0)

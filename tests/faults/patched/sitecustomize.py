"""Python imports this at the start of every process of a run under test; its folder is on PYTHONPATH.

The variable FAULTS holds {"marks": file, "patches": {name: value}}. Each process appends to the file which phase it
has reached, and patches what cannot be broken from outside.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time

FAULTS = json.loads(os.environ.get("FAULTS", "{}"))
PATCHES = FAULTS.get("patches", {})


def mark(phase):
    with open(FAULTS["marks"], "a") as file:
        file.write(f"{time.clock_gettime(time.CLOCK_MONOTONIC)} {os.getpid()} {phase}\n")


def before(owner, name, call):
    """Calls `call` before each call of `owner.name`."""
    real = getattr(owner, name)

    def both(*args, **kwargs):
        call()
        return real(*args, **kwargs)

    setattr(owner, name, both)


def callbacks(module):
    for hook, phase in (("train_epoch", "training"), ("validation", "validation"), ("test", "test")):
        before(module.EpochLog, f"on_{hook}_start", lambda phase=phase: mark(phase))


def checkpoints(module):
    before(module.AtomicCheckpoints, "save_checkpoint", lambda: mark("checkpoint"))


def panels(module):
    before(module, "draw", lambda: mark("panels"))


def prepare(module):
    before(module, "scan", lambda: mark("verifying"))
    before(module, "write_digests", lambda: mark("manifest"))


def photos(module):
    before(module, "as_image", lambda: mark("photos"))


def backbone_cache(module):
    """One pixel of the features of every image is NaN."""
    real = module.FeatureCache.__call__

    def broken(self, *args):
        features = real(self, *args)
        features[next(reversed(features))][0][..., 0, 0] = float("nan")
        return features

    if "nan" in PATCHES:
        module.FeatureCache.__call__ = broken


HOOKS = {
    "experiments.run.callbacks": callbacks,
    "experiments.run.checkpoints": checkpoints,
    "experiments.run.panels": panels,
    "datamodules.prepare.ready": prepare,
    "pmnet.segment.folder": photos,
    "pmnet.backbones.cache": backbone_cache,
}


class After(importlib.abc.MetaPathFinder):
    """Calls a hook after the import of its module."""

    def find_spec(self, name, path, target=None):
        if name not in HOOKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def then(module):
            run(module)
            HOOKS[name](module)

        spec.loader.exec_module = then
        return spec


def refuse_locks():
    """Locks as on a network disk without a lock service."""
    import errno
    import fcntl

    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = fcntl.lockf = refused


def jump_back(seconds):
    """The clock is set back by `seconds` some moments after the start, as by ntpd."""
    real, start = time.time, time.monotonic()
    time.time = lambda: real() - (seconds if time.monotonic() - start > 3 else 0)


if FAULTS:
    mark("start")
    sys.meta_path.insert(0, After())
    if "locks" in PATCHES:
        refuse_locks()
    if "clock" in PATCHES:
        jump_back(PATCHES["clock"])
    if "umask" in PATCHES:
        os.umask(PATCHES["umask"])

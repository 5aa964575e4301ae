"""From names and ``key=value`` to a run on disk: what the command line and ``perdure.run`` share.

``sources``     methods and streams by name, entry point, file or as objects
``options``     what may be set, and the method that values make
``configure``   the resolved configuration of a run, checked before any work
``folders``     a run's folder: claimed, refused, replaced
``runs``        begin, go on, reopen; several seeds
``export``      a run's model for others
``generate``    synthetic pairs ahead of the runs that replay them
"""

from perdure.benchmarks import STREAMS
from perdure.benchmarks.own.pictures import Pictures
from perdure.core.errors import PerdureError
from perdure.engine.settings import load_clip
from perdure.engine.watcher import Watcher
from perdure.launch.configure import configure, prepare, read_preset
from perdure.launch.demo import DEMO, TRY_NEXT, demo_folder
from perdure.launch.export import export
from perdure.launch.folders import is_finished, read_config, same_run, seed_folders
from perdure.launch.generate import generate
from perdure.launch.options import build, method_options
from perdure.launch.runs import begin, over_seeds, reopen, resume, run
from perdure.launch.sources import method_entry, methods, stream_of

__all__ = [
    "DEMO", "STREAMS", "TRY_NEXT", "PerdureError", "Pictures", "Watcher", "begin", "build", "configure", "demo_folder",
    "export", "generate", "is_finished", "load_clip", "method_entry", "method_options", "methods", "over_seeds", "prepare",
    "read_config", "read_preset", "reopen", "resume", "run", "same_run", "seed_folders", "stream_of",
]  # fmt: skip

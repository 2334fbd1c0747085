"""Opens a page to segment photos in the browser: drop examples, paint the object, drop photos."""

import argparse
import os
import sys
import tempfile

from pmnet.errors import SettingError

HELP = "open a page to segment photos in the browser"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head", help="a run's folder, a checkpoint, a .safetensors file, a class file, nearest or prototype"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s; 0 takes any free one)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")


def run(arguments: argparse.Namespace) -> int:
    # Read when nicegui is imported; it would look for its files in the working folder otherwise.
    os.environ["NICEGUI_STORAGE_PATH"] = os.path.join(tempfile.gettempdir(), "pmnet-page")
    try:
        from pmnet.segment.page import LOOPBACK, serve
    except ModuleNotFoundError as error:
        raise SettingError(f"{error}. The page needs the extra 'page': pip install 'pmnet[page]'.") from error
    from pmnet.segment.recipe import DEFAULT
    from pmnet.segment.segmenter import Segmenter

    segmenter = Segmenter.load(arguments.head or DEFAULT, arguments.device)
    if arguments.host not in LOOPBACK:
        print(f"Warning: everybody who reaches {arguments.host} can use this page and send it files.", file=sys.stderr)
    serve(segmenter, arguments.host, arguments.port, not arguments.no_browser)
    return 0

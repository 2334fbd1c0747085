"""Prints the list of test episodes as JSON rows [query, [supports], class]; opens no image of a benchmark.

python -m datamodules.episodes dataset=pascal fold=0 shot=5 dataset.splits=/path/to/lists > episodes.json
"""

import argparse
import json
import sys

from datamodules.command import config, load_test_episodes, one_message
from datamodules.episodes.sampler import list_hash


def main() -> None:
    parser = argparse.ArgumentParser("python -m datamodules.episodes", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as for run.py; also episodes.test=N, episodes.repeats=false")
    overrides = parser.parse_args().overrides
    with one_message():
        dataset, episodes = load_test_episodes(config(overrides))
    specs = episodes.specs
    assert isinstance(specs, list)
    print(json.dumps([spec.row() for spec in specs], separators=(",", ":")))
    print(f"{len(specs)} episodes of {dataset.name} ({dataset.splits}), sha256 {list_hash(specs)}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Draw an API key, add its hash to a file of keys, and print the key: once, on stdout, and nowhere else.

    python -m k2dist.service.new_key keys.yaml --tenant research [--role operator] [--tokens-per-minute
    200000]

Servers that have the file as `service.api_keys` take the key within a second or two. Removing its entry ends
it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

import yaml

from k2dist.errors import ConfigError
from k2dist.service.api_keys import Role, key_id, new_key, parse_keys, read_keys


def add_key(path: Path, **fields: str | int | None) -> str:
    """A new key, whose entry now stands at the end of the file. ConfigError: the file is not one of keys."""
    key, digest = new_key()
    entry = {"id": key_id(key), "sha256": digest} | {k: v for k, v in fields.items() if v is not None}
    before = ""
    if path.exists():
        read_keys(str(path))
        before = path.read_text(encoding="utf-8")
    text = before + ("" if before.endswith("\n") or not before else "\n")
    text += yaml.safe_dump([entry], sort_keys=False)
    try:
        parse_keys(yaml.safe_load(text), str(path))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path}: write it as a list of `- id: ...` at the left edge, or begin anew"
        ) from error
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # a server never sees half of it
    part.touch(mode=0o600)
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return key


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="file of keys; made if there is none")
    parser.add_argument("--tenant", required=True, help="whose key it is")
    parser.add_argument("--role", choices=get_args(Role), default="client")
    parser.add_argument("--requests-per-minute", type=int, help="default: no limit")
    parser.add_argument("--tokens-per-minute", type=int, help="of prompts and answers; default: no limit")
    parser.add_argument("--max-priority", type=int, help="of its requests; default: 0")
    options = vars(parser.parse_args())
    try:
        print(add_key(options.pop("file"), **options))
    except (ConfigError, OSError) as error:
        sys.exit(f"new_key: error: {error}")


if __name__ == "__main__":
    main()

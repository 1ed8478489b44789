"""The command `tubelet VERB`.

tubelet VERB [POSITIONAL ...] [CONFIG.yaml] [--field value] [--section.field=value]
tubelet VERB --help | --help-all | --example | --print-config
tubelet help [VERB]
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence

from tubelet.cli.verb import C, Verb, example_of, load_verb, registered
from tubelet.errors import TubeletError

# Errors of the system that a path or a disk may be the cause of; others are bugs.
_USERS_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit status 0: done; 1: done, with findings; 2: user error; 130: interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except TubeletError as error:
        print(f"tubelet: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # `tubelet info STORE | head` closed the pipe: discard the remaining output, including the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _USERS_ERRORS or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        where = f"{error.filename}: " if error.filename else ""
        problem, remedy = error.strerror, "Check the path, its permissions and whether its disk may be written"
        if error.errno == errno.EEXIST:
            remedy = "Choose another path"
        if error.errno == errno.ENOSPC:
            problem, remedy = "No space left on the device", "Finished work is kept: free some space and run it again"
        print(f"tubelet: error: {where}{problem}. {remedy}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tubelet: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130


def run(arguments: list[str]) -> int:
    """Run one verb and return its exit status; a user error is raised, not printed."""
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        from tubelet.cli.help import overview

        print(overview(registered()))
        return 0
    if arguments[0] in ("-V", "--version"):
        import tubelet

        print(f"tubelet {tubelet.__version__}")
        return 0
    return run_verb(load_verb(arguments[0]), arguments[1:])


def run_verb(verb: Verb[C], arguments: list[str]) -> int:
    """Run `verb`, or print what is asked about it."""
    from tubelet.cli.arguments import parse_arguments
    from tubelet.config import dump_yaml, load_config

    if {"-h", "--help", "--help-all"} & set(arguments):
        from tubelet.cli.help import usage

        print(usage(verb, "--help-all" in arguments))
        return 0
    if "--example" in arguments:
        print(example_of(verb.name), end="")
        return 0
    print_config = "--print-config" in arguments
    path, overrides = parse_arguments(verb, [word for word in arguments if word != "--print-config"])
    config = load_config(verb.config(), path, overrides)
    if print_config:
        print(dump_yaml(config), end="")
        return 0
    return verb.run(config)

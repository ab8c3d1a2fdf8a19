"""The command line: what Hydra refuses is answered in one sentence, by what was probably meant."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightning_modules.runs import help
from lightning_modules.runs.messages import MENDABLE, sentence
from lightning_modules.runs.settings_tree import CLOSE, CONF, GROUPS, SettingsTree, options

_FULL_ERROR = "HYDRA_FULL_ERROR"
_asked = "0"  # what the user has set it to


@contextmanager
def explaining_refusals(arguments: Sequence[str]) -> Iterator[None]:
    """End the program by one sentence for what is refused before a job starts; Hydra itself would print more.

    Until `restore_tracebacks`, whole tracebacks are asked for, which makes Hydra raise.
    """
    global _asked
    _asked = os.environ.get(_FULL_ERROR, _asked)
    if {"-h", "--help"} & {*arguments}:
        print(help.text(), end="")
        sys.exit(0)
    multirun = {"-m", "--multirun"} & {*arguments}  # for which Hydra would make a folder before it composes
    if complaint := wrong_option(arguments) or (wrong_setting(arguments) if multirun else None):
        sys.exit(f"Error: {complaint}")
    try:
        os.environ[_FULL_ERROR] = "1"
        with as_single_run() if is_single_run(arguments) else nullcontext():
            yield
    except (*MENDABLE, YAMLError) as error:
        if _asked == "1":
            raise
        sys.exit(f"Error: {_explained(arguments, error)}")
    except KeyboardInterrupt:  # where nothing has anything to save
        print("Stopped.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def is_single_run(arguments: Sequence[str]) -> bool:
    """Say if nothing asks for a sweep. Hydra composes the whole config to find out, which takes a third of its time."""
    words = ("hydra.mode", "hydra.searchpath")
    asked = any(each.startswith("-") or each.lstrip("+~").startswith(words) for each in arguments)
    texts = (path.read_text("utf-8") for path in CONF.rglob("*.yaml"))
    return not asked and not any("MULTIRUN" in text or "searchpath" in text for text in texts)


@contextmanager
def as_single_run() -> Iterator[None]:
    """Tell Hydra that this is no sweep, so that it composes the config once."""
    asked, Hydra.get_mode = Hydra.get_mode, lambda *_, **__: RunMode.RUN  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = asked  # type: ignore[method-assign]


def restore_tracebacks() -> None:
    """Restore what the user has asked for, when a job starts."""
    os.environ[_FULL_ERROR] = _asked


def wrong_option(arguments: Sequence[str]) -> str | None:
    """Explain an option that Hydra does not have, most likely a setting, or one in the wrong place."""
    known = get_args_parser()._option_string_actions
    for place, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        shortened = flag.startswith("--") and any(option.startswith(flag) for option in known)
        if not re.match("--?[+~]{0,2}[a-zA-Z]", flag) or flag in known or shortened:
            continue
        following = "".join(arguments[place + 1 : place + 2])
        if not value and not re.search("^-[a-zA-Z-]|=", following):
            value = following
        tree = SettingsTree(arguments)
        similar = tree.similar(flag.lstrip("-+~").replace("-", "_"))
        meant = " or ".join(f"{'+' * tree.is_added(key)}{key}={value or 'VALUE'}" for key in similar)
        advice = f"did you mean {meant}?" if meant else "a setting is written KEY=VALUE, without dashes"
        return f"there is no option {flag}; {advice}"
    rest = get_args_parser().parse_known_args(list(arguments))[1]
    return f"{rest[0]} comes after an option that is between settings: write options such as -m first" if rest else None


def _explained(arguments: Sequence[str], error: BaseException) -> str:
    if isinstance(error, OSError | OmegaConfBaseException) and not isinstance(error, HydraException):
        return sentence(error, dict(item.partition("=")[::2] for item in arguments if "=" in item))
    if complaint := wrong_setting(arguments):
        return complaint
    said = re.split(r"\n\s*(?:Config search path|See https|To append)", str(error))[0]
    return " ".join(said.split())


def wrong_setting(arguments: Sequence[str]) -> str | None:
    """Explain in one sentence the first setting that cannot be."""
    args, _ = get_args_parser().parse_known_args(list(arguments))
    if args.config_name and not (args.config_dir or args.config_path or (CONF / f"{args.config_name}.yaml").is_file()):
        there = ", ".join(sorted(path.stem for path in CONF.glob("*.yaml")))
        return f"--config-name: there is no config {args.config_name}; there is {there}"
    tree = SettingsTree(args.overrides)
    for place, item in enumerate(args.overrides):
        if not (override := _parsed(item)):
            return _unreadable(args.overrides, place, tree)
        if complaint := _complaint(override, tree, args.multirun):
            return complaint
    return None


def _parsed(item: str) -> Override | None:
    try:
        (override,) = OverridesParser.create().parse_overrides([item])
    except HydraException:
        return None
    return override if override.key_or_group else None


def _quoted(key: str, value: str) -> str:
    """Write an override with a text for a value, as a shell takes it."""
    text = value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')
    return shlex.quote(f'{key}="{text}"')


def _unreadable(items: Sequence[str], place: int, tree: SettingsTree) -> str:
    word, settings = items[place], [i for i, item in enumerate(items) if "=" in item]
    first = max((i for i in settings if i <= place), default=0)
    last = min((i for i in settings if i > place), default=len(items))
    key, equals, value = " ".join(items[first:last]).partition("=")
    text, listed = _quoted(key, value), shlex.quote(f"{key}=[a,b]")
    if equals and last - first > 1:
        whole = f"{key}={value.strip()}"
        listed_well = value.strip()[:1] in ("[", "{")
        meant = shlex.quote(whole) if (" " not in whole or listed_well) and _parsed(whole) else text
        return f"{word!r} is no setting; if it belongs to the one before, write {meant}"
    if word in tree.keys:
        return f"{word} has no value: write {word}=VALUE, without spaces"
    if not equals:
        chosen = " or ".join(f"{group}={word}" for group in GROUPS if word in options(group))
        return f"{word!r} is no setting" + (f"; did you mean {chosen}?" if chosen else ", which is written KEY=VALUE")
    if not re.fullmatch(r"(\+\+?|~)?\w+([./@:]\w+)*", key):
        return f"{word!r} is no setting: {key!r} is no key"
    if value.startswith("~/"):
        return f"{word} cannot be read: write {key}=$HOME{value[1:]}"
    if value[:1] not in ("[", "{"):
        return f"{word} cannot be read: write {text}"
    said = "a bracket or a quote is not closed, or a text in it needs quotes"
    return f"{word} cannot be read: {said}; a list is written {listed}, a text {text}"


def _complaint(override: Override, tree: SettingsTree, multirun: bool) -> str | None:
    key, line = str(override.key_or_group), str(override.input_line)
    name, _, value = line.partition("=")
    if override.is_sweep_override() and not multirun:
        each, text = shlex.quote(f"{name}=[{value}]"), _quoted(name, value)
        advice = "" if key in GROUPS else f"; a list is written {each}, a text {text}"
        return f"{name} has several values: add --multirun for a run of each{advice}"
    if override.package is not None or "/" in key:
        chosen = not override.is_delete() and override.package is not None and key in GROUPS
        return _unknown_choice(key, name, value) if chosen else None
    if key == "strategy":
        return f"a strategy is chosen for a name: write +strategy@strategies.NAME={value}"
    if override.is_delete() and (key in tree.keys or key in GROUPS):
        return f"~{key} is written without a value" if value else None
    if key in GROUPS:
        return _wrong_choice(key, name, value, tree)
    given, there = override.value(), tree.keys.get(key)
    if isinstance(given, Mapping) and isinstance(there, Mapping):  # these are merged
        new = [] if line[0] == "+" else [name for name in given if name not in there]
        return f"{key} has no {new[0]} yet: write +{line}" if new else None
    if referred := _referred(key, value, tree):
        return referred
    if override.is_add():
        return f"{key} is there already: write {line[1:]}" if key in tree.keys else None
    if override.is_force_add() or key in tree.keys:
        return None
    return _missing_key("~" * override.is_delete(), key, value, tree)


def _referred(key: str, value: str, tree: SettingsTree) -> str | None:
    """Explain a key below a node that is written down elsewhere."""
    for end in (place.start() for place in re.finditer(r"\.", key)):
        found = re.fullmatch(r"\$\{(\w[\w.]*)\}", str(tree.keys.get(key[:end])))
        if found:
            return f"{key[:end]} is that of {found[1]}: write {found[1]}{key[end:]}={value}"
    return None


def _wrong_choice(group: str, name: str, value: str, tree: SettingsTree) -> str | None:
    if complaint := _unknown_choice(group, name, value):
        return complaint
    if name[0] == "+" and not tree.is_added(group):
        return f"{group} is chosen already: write {group}={value}"
    return (
        f"{group} is chosen beside the others: write +{group}={value}"
        if name == group and tree.is_added(group)
        else None
    )


def _unknown_choice(group: str, name: str, value: str) -> str | None:
    there = options(group)
    for option in re.split(r"\s*,\s*", value.strip("[]")) if not re.search(r"[({]", value) else ():
        if option == "null":
            return f"{name}=null chooses nothing; there are: {', '.join(there)}"
        if option not in there:
            close = " or ".join(f"{name}={other}" for other in get_close_matches(option, there, 3, 0.6))
            guess = f"did you mean {close}? There" if close else "there"
            return f"there is no {group}={option}; {guess} are: {', '.join(there)}"
    return None


def _may_name(numbers: object, name: str) -> bool:
    """Say if a name belongs among named numbers, such as weights of judges, and is none of them misspelt."""
    is_one = isinstance(numbers, Mapping) and all(isinstance(each, int | float) for each in numbers.values())
    return is_one and not get_close_matches(name, numbers, 1, CLOSE)  # type: ignore[call-overload]


def _missing_key(sign: str, key: str, value: str, tree: SettingsTree) -> str:
    """Say what was probably meant by a key that is not there."""
    if value and not sign and tree.takes(key):
        return f"{key} is set nowhere yet: write +{key}={value}"
    parent, _, last = key.rpartition(".")
    if value and not sign and _may_name(tree.keys.get(parent), last):
        return f"{key} is set nowhere yet: write +{key}={value}"
    if parent in tree.keys and tree.keys[parent] is None and value:
        node = shlex.quote(f"{parent}={{{key.rpartition('.')[2]}: {value}}}")
        return f"there is no key {key}, as {parent} is null: write {node}"
    if inside := tree.within(key):
        meant = [f"{sign}{each}={value}" if value else f"{sign}{each}" for each in inside[:3]]
        return f"there is no key {key}; did you mean {' or '.join(meant)}?"
    if others := tree.having(key):
        return f"there is no key {key}; there is with {' or '.join(others)}"
    if guesses := tree.similar(key):
        moved = [guess for guess in guesses if value and (guess in GROUPS or guess.rpartition(".")[0] != parent)]
        meant = [f"{guess}={value}" if guess in moved else f"{sign}{guess}" for guess in guesses]
        return f"there is no key {key}; did you mean {' or '.join(meant)}?"
    node, names = tree.around(key)
    return f"there is no key {key}; {node or 'the config'} has {', '.join(names)}"

"""Plugins are met one by one: what one of them does wrong is told with its name and costs only itself."""

from __future__ import annotations

import importlib
import itertools
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from hfms_cli.config import Config, MiddlewareConfig, PluginsConfig
from hfms_cli.errors import ConfigError, PluginError, StartupError
from hfms_cli.plugins import GROUP, Plugins, discover

MIDDLEWARE = """
from dataclasses import dataclass
from hfms_cli import Middleware, Provider, hookimpl, setting

@dataclass(frozen=True)
class Options:
    level: int = setting(1, "How much.", env="{name}_LEVEL", ge=0, le=9)

class {name}(Middleware):
    def __init__(self, options):
        self.options = options

@hookimpl
def hfms_middlewares():
    yield Provider("{name}", {name}, Options)
"""

_serial = itertools.count()


class Shelf:
    """A folder with packages as pip leaves them: modules, and metadata with an entry point in the group `hfms`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, package: str, code: str, *, point: str | None = None, version: str = "1.0") -> None:
        module = f"plug_{next(_serial)}_{package}"
        (self.folder / f"{module}.py").write_text(code)
        info = self.folder / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{point or package} = {module}\n")
        importlib.invalidate_caches()

    def discover(self, config: Config | None = None) -> Plugins:
        found = [p for d in distributions(path=[str(self.folder)]) for p in d.entry_points]
        return discover(config or Config(), found)


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Shelf:
    monkeypatch.syspath_prepend(tmp_path)
    return Shelf(tmp_path)


def using(*order: str, **tables: dict[str, Any]) -> Config:
    """A configuration with these middlewares and nothing else that plugins would have to bring."""
    options = {("middleware", name): values for name, values in tables.items()}
    return Config(middleware=MiddlewareConfig(list(order)), options=options, file="my.toml")


def faults(plugins: Plugins, config: Config) -> list[StartupError]:
    """Faults that are about middlewares: the shelf has no other kind."""
    return [f for f in plugins.faults(config) if not f.message.startswith(("[storage]", "[hardware]", "[engine]"))]


def error_of(plugins: Plugins, name: str) -> str:
    error = next(i.error for i in plugins.infos if i.name == name)
    assert error is not None
    return error


def test_entry_point_becomes_a_named_record_with_its_package_and_version(shelf):
    shelf.install("loud", MIDDLEWARE.format(name="loud"), version="2.5")
    plugins = shelf.discover()
    (info,) = plugins.infos
    assert (info.name, info.package, info.version, info.enabled, info.error) == ("loud", "loud", "2.5", True, None)
    assert info.provides == ["middleware:loud"]
    assert plugins.names("middleware") == ["loud"]


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("def (", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_plugin_that_cannot_be_imported_costs_only_itself(shelf, broken, why):
    shelf.install("bad", broken)
    shelf.install("good", MIDDLEWARE.format(name="good"))
    plugins = shelf.discover()
    assert why in error_of(plugins, "bad")
    assert plugins.create("middleware", "good", Config()).name == "good"


def test_ctrl_c_while_a_plugin_is_imported_still_stops(shelf):
    shelf.install("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        shelf.discover()


@pytest.mark.parametrize("mark", ["@hookimpl\n", ""])
def test_misspelt_hook_is_reported_with_what_was_meant(shelf, mark):
    shelf.install("typo", f"from hfms_cli import hookimpl\n{mark}def hfms_midlewares():\n    return []")
    assert error_of(shelf.discover(), "typo") == "unknown hook `hfms_midlewares`; did you mean `hfms_middlewares`?"


def test_hook_that_is_nothing_like_ours_is_reported_with_all_hooks(shelf):
    shelf.install("odd", "from hfms_cli import hookimpl\n@hookimpl\ndef qwertz():\n    return []")
    assert error_of(shelf.discover(), "odd").startswith("unknown hook `qwertz`; hooks are hfms_storages, ")


def test_unmarked_hook_is_reported(shelf):
    shelf.install("bare", "def hfms_middlewares():\n    return []")
    assert error_of(shelf.discover(), "bare") == (
        "`hfms_middlewares` is not marked with @hookimpl, so it would never be called"
    )


def test_plugin_without_hooks_is_reported(shelf):
    shelf.install("idle", "answer = 42")
    assert error_of(shelf.discover(), "idle").startswith("has no hooks; there are hfms_storages, ")


def test_hook_with_a_parameter_that_it_is_not_given_is_reported(shelf):
    shelf.install("greedy", "from hfms_cli import hookimpl\n@hookimpl\ndef hfms_middlewares(more):\n    return []")
    assert "more" in error_of(shelf.discover(), "greedy")


@pytest.mark.parametrize("fault", ["raise ValueError('no disk')", "raise SystemExit('no disk')"])
def test_hook_that_raises_keeps_what_it_yielded_before(shelf, fault):
    code = MIDDLEWARE.format(name="half") + f"    {fault}\n"
    shelf.install("half", code)
    shelf.install("whole", MIDDLEWARE.format(name="whole"))
    plugins = shelf.discover()
    assert error_of(plugins, "half").startswith("hfms_middlewares: ")
    assert error_of(plugins, "half").endswith("no disk")
    assert plugins.names("middleware") == ["half", "whole"]


@pytest.mark.parametrize(
    ("record", "why"),
    [("'a name'", "yielded str, not a Provider"), ("Provider('a b', list)", "'a b' cannot be a name: only letters")],
)
def test_record_that_is_none_is_refused(shelf, record, why):
    shelf.install(
        "wrong", f"from hfms_cli import Provider, hookimpl\n@hookimpl\ndef hfms_engines():\n    return [{record}]"
    )
    plugins = shelf.discover()
    assert error_of(plugins, "wrong").startswith(f"hfms_engines: {why}")
    assert plugins.names("engine") == []


def test_duplicates_are_refused_naming_both(shelf):
    shelf.install("first", MIDDLEWARE.format(name="same"), version="1.1")
    shelf.install("second", MIDDLEWARE.format(name="same"), version="2.2")
    plugins = shelf.discover()
    assert plugins.names("middleware") == []
    with pytest.raises(PluginError) as caught:
        plugins.create("middleware", "same", Config())
    assert caught.value.message == (
        "middleware `same` is provided by first (first 1.1) and second (second 2.2); "
        "disable one under [plugins] disabled"
    )


def test_disabling_one_of_two_duplicates_leaves_the_other(shelf):
    shelf.install("first", MIDDLEWARE.format(name="same"))
    shelf.install("second", MIDDLEWARE.format(name="same"))
    plugins = shelf.discover(Config(plugins=PluginsConfig(["first"])))
    assert plugins.create("middleware", "same", Config()).name == "same"


def test_two_packages_may_use_one_entry_point_name(shelf):
    shelf.install("ours", MIDDLEWARE.format(name="one"), point="middleware")
    shelf.install("theirs", MIDDLEWARE.format(name="two"), point="middleware")
    plugins = shelf.discover()
    assert [i.error for i in plugins.infos] == [None, None]
    assert sorted(plugins.names("middleware")) == ["one", "two"]


def test_disabled_plugin_is_not_even_imported(shelf):
    shelf.install("off", "raise RuntimeError('was imported')")
    plugins = shelf.discover(Config(plugins=PluginsConfig(["off"])))
    (info,) = plugins.infos
    assert (info.enabled, info.error, info.provides) == (False, None, [])


def test_unknown_name_says_what_was_meant(shelf):
    shelf.install("limiter", MIDDLEWARE.format(name="limiter"))
    (fault,) = faults(shelf.discover(), using("limitr"))
    assert fault.message == "[middleware] order names `limitr`, which no plugin provides; did you mean `limiter`?"


def test_unknown_name_that_resembles_nothing_lists_the_choices(shelf):
    shelf.install("limiter", MIDDLEWARE.format(name="limiter"))
    shelf.install("shouter", MIDDLEWARE.format(name="shouter"))
    (fault,) = faults(shelf.discover(), using("zzz"))
    assert fault.message.endswith("there are: limiter, shouter")


def test_missing_name_tells_which_plugins_failed(shelf):
    shelf.install("limiter", "1 / 0")
    (fault,) = faults(shelf.discover(), using("limiter"))
    assert "(plugins that failed: limiter: ZeroDivisionError: division by zero)" in fault.message


def test_broken_plugin_that_is_not_used_is_no_fault(shelf):
    shelf.install("broken", "1 / 0")
    assert faults(shelf.discover(), using()) == []


def test_order_of_the_operator_is_kept_whatever_the_packages_are_called(shelf):
    for name in ("aaa", "mmm", "zzz"):
        shelf.install(name, MIDDLEWARE.format(name=name))
    plugins, config = shelf.discover(), using("zzz", "aaa", "mmm")
    assert [plugins.create("middleware", n, config).name for n in config.order("middleware")] == ["zzz", "aaa", "mmm"]


def test_plugin_gets_its_options_from_its_table_and_its_variable(shelf):
    shelf.install("loud", MIDDLEWARE.format(name="loud"))
    plugins = shelf.discover()
    assert plugins.create("middleware", "loud", using("loud", loud={"level": 7})).options.level == 7
    config = Config(environ={"HFMS_loud_LEVEL": "8"})
    assert plugins.create("middleware", "loud", config).options.level == 8


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"levle": 1}, "my.toml [middleware.loud]: unknown key `levle`; did you mean `level`?"),
        ({"level": 10}, "my.toml [middleware.loud]: `level` is 10, which is not an integer from 0 to 9"),
    ],
)
def test_bad_option_of_a_plugin_is_told_as_one_of_ours(shelf, values, said):
    shelf.install("loud", MIDDLEWARE.format(name="loud"))
    plugins, config = shelf.discover(), using(loud=values)
    assert [f.message for f in faults(plugins, config)] == [said]
    with pytest.raises(ConfigError):
        plugins.create("middleware", "loud", config)


def test_bad_variable_of_a_listed_plugin_is_found_without_a_table(shelf):
    shelf.install("loud", MIDDLEWARE.format(name="loud"))
    config = Config(middleware=MiddlewareConfig(["loud"]), environ={"HFMS_loud_LEVEL": "lots"})
    assert [f.message for f in faults(shelf.discover(), config)] == [
        "HFMS_loud_LEVEL is 'lots', which is not an integer from 0 to 9"
    ]


def test_table_of_a_plugin_that_is_not_there_is_a_fault_unless_it_is_empty(shelf):
    assert faults(shelf.discover(), using(nobody={})) == []
    (fault,) = faults(shelf.discover(), using(nobody={"level": 1}))
    assert "names `nobody`, which no plugin provides" in fault.message


def test_check_raises_the_first_fault(shelf):
    with pytest.raises(PluginError, match=r"\[storage\] order names `local`"):
        shelf.discover().check(Config())


def test_factory_that_raises_is_told_with_kind_and_name(shelf):
    shelf.install(
        "frail",
        "from hfms_cli import Provider, hookimpl\n@hookimpl\ndef hfms_engines():\n"
        "    yield Provider('frail', lambda: 1 / 0)",
    )
    with pytest.raises(PluginError) as caught:
        shelf.discover().create("engine", "frail", Config())
    assert caught.value.message == "engine `frail` could not be made: ZeroDivisionError: division by zero"


def test_error_that_a_factory_means_is_passed_on(shelf):
    shelf.install(
        "picky",
        "from hfms_cli import ConfigError, Provider, hookimpl\n"
        "def make():\n    raise ConfigError('picky wants a key file')\n"
        "@hookimpl\ndef hfms_engines():\n    yield Provider('picky', make)",
    )
    with pytest.raises(ConfigError, match="picky wants a key file"):
        shelf.discover().create("engine", "picky", Config())


def test_command_hooks_are_each_called_and_one_that_raises_is_noted(shelf):
    shelf.install(
        "bad", "from hfms_cli import hookimpl\n@hookimpl\ndef hfms_commands(app):\n    app.append('bad'); 1 / 0"
    )
    shelf.install("good", "from hfms_cli import hookimpl\n@hookimpl\ndef hfms_commands(app):\n    app.append('good')")
    plugins, seen = shelf.discover(), []
    plugins.call("hfms_commands", seen)
    assert sorted(seen) == ["bad", "good"]
    assert error_of(plugins, "bad") == "hfms_commands: ZeroDivisionError: division by zero"
    assert next(i.error for i in plugins.infos if i.name == "good") is None


def test_verbs_of_a_record_are_there_only_where_the_order_lists_it(shelf):
    shelf.install(
        "roller",
        "from hfms_cli import Middleware, Provider, hookimpl\n@hookimpl\ndef hfms_middlewares():\n"
        "    yield Provider('roller', Middleware, commands=lambda app: app.append('roll'))\n"
        "    yield Provider('broken', Middleware, commands=lambda app: 1 / 0)",
    )
    plugins, seen = shelf.discover(), []
    plugins.add_commands(seen, Config(middleware=MiddlewareConfig([])))
    assert (seen, [i.error for i in plugins.infos]) == ([], [None])
    plugins.add_commands(seen, Config(middleware=MiddlewareConfig(["roller", "broken"])))
    assert seen == ["roll"]
    assert error_of(plugins, "roller") == "middleware `broken`: ZeroDivisionError: division by zero"

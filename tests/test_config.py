"""`hfms.toml`, the environment and flags: every setting works from each, and every mistake is told."""

from __future__ import annotations

import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from hfms_cli.config import STORAGE_OFF, STORAGE_SWITCHES, SWITCHES, TABLES, Config, StorageConfig, load_config
from hfms_cli.errors import ConfigError
from hfms_cli.hookspecs import KINDS
from hfms_cli.plugins import GROUP, discover
from hfms_cli.settings import PREFIXES, Setting, settings_of

CORE = [(name, s) for name, cls, _ in TABLES for s in settings_of(cls)]
FIRST_PARTY = discover(Config(), [p for p in entry_points(group=GROUP) if p.dist and p.dist.name == "hfms"])
OPTIONS = [
    (kind, name, s)
    for kind in KINDS
    for name in FIRST_PARTY.names(kind)
    for s in settings_of(FIRST_PARTY.record(kind, name).options)
]


def another(s: Setting) -> Any:
    """A value that the setting may have and that is not its default."""
    kinds = {get_origin(s.type) or s.type, *get_args(s.type)}
    if s.choices:
        return next(c for c in s.choices if c != s.default)
    if bool in kinds:
        return not s.default
    if list in kinds:
        return ["one", "two"]
    if dict in kinds:
        return {"one": "two"}
    if int in kinds or float in kinds:
        number = float if float in kinds else int
        candidates = [(s.default or 0) + 1, (s.default or 0) - 1, s.ge, s.le]
        return number(next(c for c in candidates if c is not None and c != s.default and in_range(s, c)))
    return "something"


def in_range(s: Setting, number: float) -> bool:
    return (s.ge is None or number >= s.ge) and (s.le is None or number <= s.le)


def as_text(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def ids(case: Any) -> str:
    return ".".join(part.name if isinstance(part, Setting) else part for part in case)


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "hfms.toml"
        path.write_text(text)
        return path

    return write


def message(path: Path | None, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ=environ or {})
    return caught.value.message


@pytest.mark.parametrize("case", CORE, ids=ids)
def test_every_setting_is_read_from_the_file(case, written):
    table, s = case
    config = load_config(written(tomli_w.dumps({table: {s.name: another(s)}})), environ={})
    assert getattr(getattr(config, table), s.name) == another(s) != s.default
    assert config.origins[table, s.name] == "file"


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("case", [c for c in CORE if c[1].env], ids=ids)
def test_every_variable_works(case, prefix, written):
    table, s = case
    file = written(tomli_w.dumps({table: {s.name: s.default}}))
    config = load_config(file, environ={prefix + s.env: as_text(another(s))})
    assert getattr(getattr(config, table), s.name) == another(s) != s.default
    assert config.origins[table, s.name] == prefix + s.env


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("case", [c for c in OPTIONS if c[2].env], ids=ids)
def test_every_variable_of_a_first_party_plugin_works(case, prefix):
    kind, name, s = case
    config = load_config(environ={prefix + s.env: as_text(another(s)), "HFMS_CONFIG": ""})
    options = config.plugin_options(kind, name, FIRST_PARTY.record(kind, name).options)
    assert getattr(options, s.name) == another(s) != s.default


@pytest.mark.parametrize("case", OPTIONS, ids=ids)
def test_every_option_of_a_first_party_plugin_is_read_from_its_table(case, written):
    kind, name, s = case
    config = load_config(written(tomli_w.dumps({kind: {name: {s.name: another(s)}}})), environ={})
    options = config.plugin_options(kind, name, FIRST_PARTY.record(kind, name).options)
    assert getattr(options, s.name) == another(s) != s.default


@pytest.mark.parametrize("case", CORE, ids=ids)
def test_flag_wins_over_all_else(case, written):
    table, s = case
    config = load_config(written(""), environ={}, flags={table: {s.name: another(s)}})
    assert getattr(getattr(config, table), s.name) == another(s)
    assert config.origins[table, s.name] == "flag"


def test_no_variable_means_two_things():
    """HFMS_CACHE_DIR is the core's and a storage's, which say the same of it."""
    meaning = dict.fromkeys([*SWITCHES, *STORAGE_SWITCHES, *STORAGE_OFF], "")
    for s in [case[-1] for case in (*CORE, *OPTIONS) if case[-1].env]:
        assert meaning.setdefault(s.env, s.help) == s.help


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("switch", "name"), SWITCHES.items())
def test_every_enable_switch_puts_its_middleware_in_and_takes_it_out(switch, name, prefix):
    others = [n for n in SWITCHES.values() if n != name]
    without = {"HFMS_MIDDLEWARE": ",".join(others), "HFMS_CONFIG": ""}
    everything = {"HFMS_MIDDLEWARE": ",".join(SWITCHES.values()), "HFMS_CONFIG": ""}
    on = load_config(environ=without | {prefix + switch: "1"})
    assert on.middleware.order == ["auth", "rate_limit", "cache", "queue", "breaker"]
    assert on.origins["middleware", "order"] == f"HFMS_MIDDLEWARE, {prefix + switch}"
    assert load_config(environ=everything | {prefix + switch: "false"}).middleware.order == [
        n for n in on.middleware.order if n != name
    ]


def test_enable_switch_leaves_a_middleware_where_the_operator_put_it(written):
    file = written('[middleware]\norder = ["queue", "auth"]')
    assert load_config(file, environ={"HFMS_ENABLE_AUTH": "yes"}).middleware.order == ["queue", "auth"]


def test_enable_switch_that_is_neither_true_nor_false_is_refused():
    assert message(None, {"HF_SERVER_ENABLE_CACHING": "perhaps", "HFMS_CONFIG": ""}) == (
        "HF_SERVER_ENABLE_CACHING is 'perhaps', which is not true or false"
    )


@pytest.mark.parametrize("prefix", [*PREFIXES, ""])
@pytest.mark.parametrize(("switch", "name"), STORAGE_SWITCHES.items())
def test_every_storage_switch_puts_its_storage_in_and_takes_it_out(switch, name, prefix):
    usual = StorageConfig().order
    without = {"HFMS_STORAGE_ORDER": ",".join(n for n in usual if n != name), "HFMS_CONFIG": ""}
    on = load_config(environ=without | {prefix + switch: "true"})
    assert on.storage.order == usual
    assert on.origins["storage", "order"] == f"HFMS_STORAGE_ORDER, {prefix + switch}"
    off = load_config(environ={"HFMS_CONFIG": "", prefix + switch: "0"})
    assert off.storage.order == [n for n in usual if n != name]


@pytest.mark.parametrize("prefix", [*PREFIXES, ""])
@pytest.mark.parametrize(("switch", "name"), STORAGE_OFF.items())
def test_ipfs_kit_disable_wins_over_the_switch_that_turns_it_on(switch, name, prefix):
    usual = StorageConfig().order
    environ = {"HFMS_CONFIG": "", "ENABLE_IPFS_KIT": "1"}
    assert load_config(environ=environ | {prefix + switch: "1"}).storage.order == [n for n in usual if n != name]
    assert load_config(environ=environ | {prefix + switch: "0"}).storage.order == usual


@pytest.mark.parametrize("prefix", [*PREFIXES, ""])
def test_variables_of_other_programs_are_read_without_a_prefix(prefix):
    given = {"IPFS_BACKEND": "kubo", "KUBO_CMD": "/opt/ipfs", "IPFS_API": "/ip4/10.0.0.1/tcp/5001"}
    config = load_config(environ={"HFMS_CONFIG": ""} | {prefix + name: value for name, value in given.items()})
    options = config.plugin_options("storage", "kubo", FIRST_PARTY.record("storage", "kubo").options)
    assert (config.storage.backend, options.command, options.api) == tuple(given.values())


def test_a_backend_that_no_order_names_is_used_all_the_same():
    config = load_config(environ={"HFMS_CONFIG": "", "HFMS_STORAGE_ORDER": "hf_cache", "IPFS_BACKEND": "gateway"})
    assert config.order("storage") == ["gateway", "hf_cache"]


def test_order_of_a_list_is_the_operators(written):
    order = ["z", "a", "m"]
    config = load_config(written(tomli_w.dumps({"storage": {"order": order}})), environ={})
    assert config.order("storage") == order


def test_every_kind_of_plugin_has_an_order():
    config = Config()
    assert [config.order(kind) for kind in KINDS] == [
        config.storage.order, config.hardware.preferred, config.engine.order, config.middleware.order,
    ]  # fmt: skip


def test_hfms_config_names_the_file(written):
    file = written("[server]\nport = 1234")
    assert load_config(environ={"HFMS_CONFIG": str(file)}).server.port == 1234


def test_a_named_file_wins_over_hfms_config(written, tmp_path):
    (tmp_path / "other.toml").write_text("[server]\nport = 4321")
    file = written("[server]\nport = 1234")
    assert load_config(tmp_path / "other.toml", environ={"HFMS_CONFIG": str(file)}).server.port == 4321


def test_hfms_toml_of_the_current_folder_is_read(written, monkeypatch):
    monkeypatch.chdir(written("[server]\nport = 1234").parent)
    assert load_config(environ={}).server.port == 1234


def test_no_file_means_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(environ={})
    assert all(getattr(config, name) == cls() for name, cls, _ in TABLES)
    assert set(config.origins.values()) == {"default"}


def test_a_named_file_that_is_missing_is_an_error(tmp_path):
    assert "nowhere.toml: cannot be read: No such file or directory" in message(tmp_path / "nowhere.toml")


def test_unknown_table_names_what_was_meant(written):
    path = written("[sever]\nport = 1")
    assert message(path) == f"{path}: unknown table `[sever]`; did you mean `[server]`?"


def test_unknown_table_that_resembles_nothing_lists_the_tables(written):
    assert message(written("[zzzzzz]")).endswith(
        "known tables: server, log, models, engine, hardware, storage, middleware, plugins"
    )


@pytest.mark.parametrize("table", [name for name, _, _ in TABLES])
def test_unknown_key_names_file_table_and_key(table, written):
    path = written(f"[{table}]\nqwertz = 1")
    assert message(path).startswith(f"{path} [{table}]: unknown key `qwertz`; known keys: ")


@pytest.mark.parametrize("case", CORE, ids=ids)
def test_every_setting_refuses_a_wrong_type_by_name(case, written):
    table, s = case
    path = written(f"[{table}]\n{s.name} = 1979-05-27")
    assert message(path).startswith(f"{path} [{table}]: `{s.name}` is datetime.date(1979, 5, 27), which is not ")


@pytest.mark.parametrize("case", [c for c in CORE if c[1].ge is not None or c[1].le is not None], ids=ids)
def test_every_range_is_held(case, written):
    table, s = case
    for bound, step in ((s.ge, -1), (s.le, 1)):
        if bound is not None:
            assert "which is not" in message(written(f"[{table}]\n{s.name} = {bound + step}"))
            value = load_config(written(f"[{table}]\n{s.name} = {bound}"), environ={})
            assert getattr(getattr(value, table), s.name) == bound


@pytest.mark.parametrize("text", ["server = 1", "[[server]]\nport = 1"])
def test_a_table_that_is_no_table_is_refused(text, written):
    path = written(text)
    assert message(path) == f"{path}: `server` must be a table, written `[server]`"


def test_broken_toml_says_where(written):
    path = written("[server]\nport = oops")
    assert message(path) == f"{path}: is not valid TOML: Invalid value (at line 2, column 8)"


def test_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "hfms.toml"
    path.write_bytes(b"[log]\n#\xff")
    assert message(path) == f"{path}: is not UTF-8 text (byte 7)"


def test_options_of_a_plugin_are_kept_for_it_and_name_their_table(written):
    kind, name, s = ("middleware", "mine", "level")
    config = load_config(written(f"[{kind}.{name}]\n{s} = 3"), environ={})
    assert config.options == {(kind, name): {s: 3}}
    with pytest.raises(ConfigError, match=r"hfms\.toml \[middleware\.mine\]: unknown key `level`"):
        config.plugin_options(kind, name, TABLES[0][1])


def toml_values(s: Setting) -> st.SearchStrategy[Any]:
    kinds = {get_origin(s.type) or s.type, *get_args(s.type)}
    text = st.text(st.characters(codec="utf-8"))
    if s.choices:
        return st.sampled_from(s.choices)
    if bool in kinds:
        return st.booleans()
    if list in kinds:
        return st.lists(text)
    if dict in kinds:
        return st.dictionaries(text, text)
    if float in kinds:
        return st.floats(s.ge, s.le, allow_nan=False)
    if int in kinds:
        return st.integers(-(2**63) if s.ge is None else int(s.ge), 2**63 - 1 if s.le is None else int(s.le))
    return text


whole_files = st.fixed_dictionaries(
    {
        name: st.fixed_dictionaries({}, optional={s.name: toml_values(s) for s in settings_of(cls)})
        for name, cls, _ in TABLES
    }
)


@settings(deadline=None)  # a busy machine may take its time
@given(tables=whole_files)
def test_any_file_of_right_values_is_read_as_written(tables, tmp_path_factory):
    path = tmp_path_factory.mktemp("round") / "hfms.toml"
    path.write_bytes(tomli_w.dumps(tables).encode())
    assert tomllib.loads(path.read_text(encoding="utf-8")) == tables
    config = load_config(path, environ={})
    got = {name: {key: getattr(getattr(config, name), key) for key in values} for name, values in tables.items()}
    assert got == tables


def test_state_folder_is_the_setting_or_the_users_own():
    assert Config(environ={"XDG_STATE_HOME": "/somewhere"}).state_dir == Path("/somewhere/hfms")
    assert Config(environ={}).state_dir == Path("~/.local/state/hfms").expanduser()
    assert load_config(environ={"HFMS_STATE_DIR": "~/s", "HFMS_CONFIG": ""}).state_dir == Path("~/s").expanduser()

"""What is unloaded so that another model fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hfms_cli.models.eviction import Held, choose, freed_by

MEMORIES = ("cpu", "cuda:0")


@st.composite
def models(draw) -> list[Held]:
    count = draw(st.integers(0, 6))
    return [
        Held(
            id=str(number),
            last_used=draw(st.integers(0, 5)),
            frees={memory: draw(st.integers(0, 9)) for memory in draw(st.sets(st.sampled_from(MEMORIES)))},
            in_use=draw(st.booleans()),
            pinned=draw(st.booleans()),
            steady=draw(st.booleans()),
        )
        for number in range(count)
    ]


def needing(**bytes_of):
    return lambda freed: all(freed.get(memory.replace("_", ":"), 0) >= size for memory, size in bytes_of.items())


needs = st.builds(lambda a, b: needing(cpu=a, cuda_0=b), st.integers(0, 20), st.integers(0, 20))


@given(models(), needs)
def test_what_is_in_use_pinned_or_on_its_way_is_never_chosen(held, fits):
    for chosen in choose(held, fits) or ():
        assert not chosen.in_use
        assert not chosen.pinned
        assert chosen.steady


@given(models(), needs)
def test_enough_is_freed_or_nothing_is_chosen_because_all_would_not_be_enough(held, fits):
    chosen = choose(held, fits)
    if chosen is None:
        assert not fits(freed_by(m for m in held if m.evictable))
    else:
        assert fits(freed_by(chosen))


@given(models(), needs)
def test_none_of_what_is_chosen_could_be_spared(held, fits):
    chosen = choose(held, fits) or []
    for spared in chosen:
        assert not fits(freed_by(m for m in chosen if m is not spared))


@given(models(), needs)
def test_of_models_of_one_size_the_least_recently_used_go(held, fits):
    alike = [Held(m.id, m.last_used, {"cpu": 1}, m.in_use, m.pinned, m.steady) for m in held]
    chosen = choose(alike, fits)
    if chosen:
        kept = [m for m in alike if m.evictable and m not in chosen]
        assert all(gone.last_used <= m.last_used for gone in chosen for m in kept)


def test_one_large_model_goes_rather_than_it_and_the_small_ones_before_it():
    small, large = Held("small", 1, {"cpu": 2}), Held("large", 2, {"cpu": 10})
    assert choose([small, large], needing(cpu=10)) == [large]


def test_a_model_on_another_device_stays():
    here, elsewhere = Held("here", 2, {"cpu": 4}), Held("elsewhere", 1, {"cuda:0": 4})
    assert choose([here, elsewhere], needing(cpu=3)) == [here]

"""Names, cards, options, and the errors of a user who mistypes them."""

import pytest

import zoo
from zoo._registry import Card, register


def test_names_are_sorted_and_filtered():
    assert zoo.names() == sorted(zoo.names())
    assert zoo.names("fracbnn_[cd]*") == ["fracbnn_cifar10", "fracbnn_digits"]
    assert zoo.names("no such thing") == []


def test_unknown_network_offers_the_nearest():
    with pytest.raises(zoo.ZooError, match="'fracbn_cifar10'.*near it: fracbnn_cifar10"):
        zoo.get("fracbn_cifar10")
    with pytest.raises(zoo.ZooError, match="fracbnn_cifar10"):
        zoo.card("xyz")


def test_unknown_option_offers_the_nearest():
    with pytest.raises(zoo.ZooError, match="no option 'fixed_pont'; did you mean fixed_point"):
        zoo.get("fracbnn_cifar10", fixed_pont=None)


def test_unknown_arithmetic_is_refused():
    with pytest.raises(ValueError, match="'autors'.*'authors' or a FixedPoint"):
        zoo.get("fracbnn_cifar10", fixed_point="autors")


def _card(**options: str) -> Card:
    return Card("t", "p", "", "c", "l", (1, 2, 2), 2, 0, 0, options)


def test_a_name_is_registered_once():
    with pytest.raises(TypeError, match="two networks are called fracbnn_digits"):

        @register(_card())
        def fracbnn_digits():
            return None


def test_options_are_keyword_only_and_described():
    with pytest.raises(TypeError, match="width must be keyword-only"):

        @register(_card(width="w"))
        def some_network(width=1):
            return None

    with pytest.raises(TypeError, match="card describes the options"):

        @register(_card(depth="d"))
        def other_network(*, width=1):
            return None

    assert zoo.names("*_network") == []


def test_card_reads_as_text():
    text = str(zoo.card("fracbnn_cifar10"))
    assert "2012.12206" in text and "287,146 parameters" in text and "fixed_point" in text

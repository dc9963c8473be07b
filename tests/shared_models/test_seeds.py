"""Randomness that depends on where and when, never on process state."""

from __future__ import annotations

import random

import laws
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared_models.seeds import derive, generator

parts = st.lists(st.integers(0, 10**9) | st.text("abc-0123", max_size=6), min_size=1, max_size=4)


class TestDerive:
    def test_values_are_the_same_on_every_machine(self):
        """
        The first 16 digits of `printf '0\\x1fsite-1\\x1f3' | sha256sum` and its like, halved.
        """
        assert derive(0) == 0x5FECEB66FFC86F38 >> 1
        assert derive(0, "site-1", 3) == 0x55EF6E68C40631B7
        assert derive(7, "initial weights") == 0x356708E23D0A5E16

    @laws.SAME_EXAMPLES
    @given(parts, parts)
    def test_other_parts_give_another_seed(self, one, other):
        """
        Two different sequences of words and numbers never share a seed.
        """
        assert (derive(*one) == derive(*other)) == ([str(p) for p in one] == [str(p) for p in other])

    def test_parts_do_not_run_into_each_other(self):
        """
        Where one word ends and the next begins matters, and so does their order.
        """
        assert len({derive("ab", "c"), derive("a", "bc"), derive("abc"), derive("c", "ab"), derive("ab", "c", "")}) == 5

    @laws.SAME_EXAMPLES
    @given(parts)
    def test_seed_is_one_that_every_library_takes(self, words):
        """
        63 bits and no sign: torch and NumPy both accept it.
        """
        assert 0 <= derive(*words) < 2**63
        torch.Generator().manual_seed(derive(*words))


class TestGenerator:
    def test_draws_are_the_same_on_every_machine(self):
        """
        The first numbers of one generator, written down once.
        """
        rng = generator(0, "site-1", 3, 0)

        assert rng.integers(0, 1000, 5).tolist() == [734, 220, 703, 750, 417]

    def test_draws_do_not_depend_on_what_was_drawn_before(self):
        """
        No global generator, and no other of these, changes what one gives.
        """
        first = generator("a", 1).normal(size=4)
        random.seed(1)
        np.random.seed(1)
        generator("a", 2).normal(size=10)

        assert generator("a", 1).normal(size=4).tobytes() == first.tobytes()
        assert generator("a", 2).normal(size=4).tobytes() != first.tobytes()

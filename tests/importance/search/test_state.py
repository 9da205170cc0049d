"""What a search has found, on disk: it comes back whole, of this search alone, or is refused in one sentence."""

from __future__ import annotations

import pytest

from LLMPruner.errors import UsageError
from LLMPruner.files import write_json
from LLMPruner.importance.budget import Prunable
from LLMPruner.importance.search.state import SearchState

MLPS = [Prunable(layer, "mlp", (9, 5, 4, 0), 10) for layer in range(2)]


def test_a_state_is_refused_for_another_search(tmp_path):
    path = tmp_path / "search_state.json"
    state = SearchState([{2: 1.0}, {}], [1, 0], 0.5, 3, 1, [{3: 0.7}, {}])
    state.save(path, {"seed": 1})
    assert SearchState.load(path, {"seed": 1}, MLPS) == state
    with pytest.raises(UsageError, match="other settings"):
        SearchState.load(path, {"seed": 2}, MLPS)
    path.write_text("[]")
    with pytest.raises(UsageError, match="other settings"):
        SearchState.load(path, {"seed": 1}, MLPS)


@pytest.mark.parametrize(
    "damage",
    [
        {"costs": [[0.0, 1.0]]},
        {"costs": [{}]},
        {"costs": [{4: 1.0}, {}]},
        {"levels": [0, 0, 0]},
        {"levels": [0, 4]},
        {"levels": [-1, 0]},
        {"levels": [0, 1.0]},
        {"levels": [0, "1"]},
        {"levels": 2},
        {"levels": 0},
        {"levels": [True, False]},
        {"generation": 1},
        {"generation": 1, "costs": [{}, {}]},
        {"generation": "1", "levels": [0, 0]},
        {"stale": None},
        {"costs": [{"1": "x"}, {}]},
        {"costs": [{"1": None}, {}]},
        {"shifts": [{"1": 0.1}, {}]},
        {"levels": [0, 0], "shifts": [{}, {}, {}]},
        {"levels": [0, 0], "shifts": [{}, {7: 0.1}]},
    ],
    ids=str,
)
def test_a_damaged_state_is_one_sentence(tmp_path, damage):
    path = tmp_path / "search_state.json"
    write_json(path, {"key": {"seed": 1}} | damage)
    with pytest.raises(UsageError, match="not a search state"):
        SearchState.load(path, {"seed": 1}, MLPS)

"""The name of the cache against signatures of both kinds."""

from functools import wraps

from halfplate.models.arguments import cache_argument


def test_the_name_is_that_of_the_signature():
    def old(input_ids=None, past_key_values=None, **others): ...

    def new(input_ids=None, cache=None, **others): ...

    @wraps(new)
    def decorated(*args, **kwargs): ...

    assert [cache_argument(forward) for forward in (old, new, decorated)] == ["past_key_values", "cache", "cache"]

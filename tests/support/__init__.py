"""What the tests share. Failed assertions of these modules show their values, as in the tests themselves."""

import pytest

pytest.register_assert_rewrite("support.problems", "support.sharded")

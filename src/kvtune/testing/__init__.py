"""Public conformance suites and fakes for authors of policies, indexes and codecs.

A suite is a base class of plain test methods: subclass it with a name that starts with `Test`, give
it its one factory method, and let pytest collect it::

    from kvtune.testing.eviction_policy import EvictionPolicySuite

    class TestMyPolicy(EvictionPolicySuite):
        def make_policy(self):
            return MyPolicy()

Import the module you need; nothing is loaded here.
"""

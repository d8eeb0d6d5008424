"""What probes compute, against the truth: the numbers the targets know.

The pure part first: results as values. Then live targets whose threads call
a probed function a known number of times with known arguments.
"""
import math
import random
import unittest

import live

ubp = live.core()
x86 = ubp.ubp_x86


def histogram_of(values, is_signed=True):
    """A Histogram as the bodies would have left it in shared memory."""
    counts = [0] * 2 * x86.N_BUCKETS
    for value in values:
        counts[x86.bucket_index(value) if value >= 0
               else x86.N_BUCKETS + x86.bucket_index(-value)] += 1
    return ubp.histogram_of_counts(
        counts, min(values, default=0), max(values, default=0), sum(values),
        is_signed)


def some_values(seed, n):
    """Numbers of all magnitudes, of both signs."""
    rng = random.Random(seed)
    return [rng.choice((1, -1)) * rng.getrandbits(rng.randrange(1, 64))
            for _ in range(n)]


class Histograms(unittest.TestCase):

    def test_numbers_are_those_of_the_values(self):
        for seed, n in ((1, 1), (2, 10), (3, 1000), (4, 20000)):
            values = some_values(seed, n)
            made = histogram_of(values)
            self.assertEqual(
                (made.count, made.sum, made.min, made.max),
                (n, sum(values), min(values), max(values)))
            self.assertEqual(made.mean, sum(values) / n)

    def test_half_of_a_sum_that_was_read_too_early_is_completed(self):
        for values in some_values(5, 100), [-1] * 3, [1 << 62] * 9:
            made = histogram_of(values)
            for wrong in (sum(values) - (1 << 64), sum(values) + (1 << 64)):
                counts = [0] * 2 * x86.N_BUCKETS
                for value in values:
                    counts[x86.bucket_index(abs(value))
                           + (value < 0) * x86.N_BUCKETS] += 1
                self.assertEqual(made, ubp.histogram_of_counts(
                    counts, min(values), max(values), wrong, True))

    def test_percentiles_are_within_a_sixteenth(self):
        for seed in range(20):
            values = sorted(some_values(seed, 500))
            made = histogram_of(values)
            for p in (0, 0.1, 1, 25, 50, 75, 90, 99, 99.9, 100):
                rank = max(1, math.ceil(len(values) * p / 100))
                exact, got = values[rank - 1], made.percentile(p)
                self.assertLessEqual(abs(got - exact), abs(exact) / 16, p)
            self.assertEqual(made.percentile(0), values[0])
            self.assertEqual(made.percentile(100), values[-1])

    def test_sum_of_two_is_that_of_all_values(self):
        for seed in range(10):
            one, other = some_values(seed, 50), some_values(seed + 100, 70)
            self.assertEqual(histogram_of(one) + histogram_of(other),
                             histogram_of(one + other))
        self.assertEqual(histogram_of(one) + ubp.Histogram(),
                         histogram_of(one))
        self.assertEqual(sum([histogram_of(one), histogram_of(other)],
                             ubp.Histogram()), histogram_of(one + other))

    def test_interval_is_what_came_since(self):
        first, later = some_values(1, 100), some_values(2, 50)
        interval = histogram_of(first + later) - histogram_of(first)
        self.assertEqual(interval.buckets, histogram_of(later).buckets)
        self.assertEqual((interval.count, interval.sum),
                         (50, sum(later)))
        self.assertLessEqual(interval.min, min(later))
        self.assertGreaterEqual(interval.max, max(later))
        self.assertEqual(interval - interval, ubp.Histogram())

    def test_nothing_recorded_has_no_mean(self):
        empty = ubp.Histogram()
        self.assertEqual((empty.count, empty.mean, empty.percentile(50)),
                         (0, None, None))

    def test_json_comes_back_as_it_was(self):
        made = histogram_of(some_values(7, 300))
        self.assertEqual(made, ubp.Histogram.from_buckets(
            [list(bucket) for bucket in made.buckets], made.sum, made.min,
            made.max))

    def test_what_is_no_histogram_is_refused(self):
        for buckets in ([[1, 0, 1]], [[0, 1, -1]], [[0, 5, 1], [5, 6, 1]],
                        [[8, 9, 1], [0, 1, 1]]):
            with self.assertRaises(ValueError):
                ubp.Histogram.from_buckets(buckets, 0, 0, 0)
        for p in (-1, 101):
            with self.assertRaises(ValueError):
                ubp.Histogram().percentile(p)

    def test_hostile_words_are_not_believed(self):
        """min, max and sum that contradict the buckets are corrected."""
        made = ubp.histogram_of_counts([0, 0, 3] + [0] * 493, 1 << 70, -5,
                                       1 << 40, False)
        self.assertEqual((made.count, made.sum, made.min, made.max),
                         (3, 6, 2, 2))


class Sums(unittest.TestCase):

    def test_sums_and_dicts_add_up(self):
        both = ubp.added({1: ubp.Sum(5, 2), 2: ubp.Sum(1, 1)},
                         {1: ubp.Sum(-7, 1)})
        self.assertEqual(both, {1: -2, 2: 1})
        self.assertEqual(both[1].count, 3)
        self.assertEqual(ubp.added(3, 4), 7)


if __name__ == "__main__":
    unittest.main()

//! Medians of alternating event timings.

use std::time::Duration;

use anyhow::Result;

use crate::median;

/// What one timing should last, so that the start of a kernel and the clock's grain count little.
const TIMING: f64 = 400e-6;

/// The most calls in one timing.
const CALLS: usize = 32;

/// A clock of a device: does the work once and says how long it took, `None` where time means nothing.
pub(super) type Clock<'a> = dyn Fn(&mut dyn FnMut() -> Result<()>) -> Result<Option<Duration>> + 'a;

/// Median seconds of one call of `run(way, copy)` for each of `ways` ways to do something: `rounds` timings of each, one
/// way after the other in every round, and each round beginning with another way, so that a device that slows down or
/// speeds up favours none. Calls get ever other copies, of which they take the rest by the number of copies that they
/// have.
///
/// A way that fails has its error in place of a figure. Without a clock everything runs once and there are no figures.
pub(super) fn medians(
    clock: &Clock,
    ways: usize,
    rounds: usize,
    run: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Vec<std::result::Result<Option<f64>, String>> {
    let mut calls = vec![1; ways];
    let mut results: Vec<std::result::Result<Option<f64>, String>> = Vec::new();
    for (way, calls) in calls.iter_mut().enumerate() {
        // The first calls compile, choose and load; two more tell how long one takes.
        let warm = (0..2).try_for_each(|copy| run(way, copy)).and_then(|()| clock(&mut || run(way, 2)));
        let again = warm.and_then(|_| clock(&mut || run(way, 3)));
        if let Ok(Some(time)) = again {
            *calls = (TIMING / time.as_secs_f64().max(1e-6)).ceil().clamp(1.0, CALLS as f64) as usize;
        }
        results.push(again.map(|t| t.map(|t| t.as_secs_f64())).map_err(|e| format!("{e:#}")));
    }
    let timed = |r: &std::result::Result<Option<f64>, String>| matches!(r, Ok(Some(_)));
    let mut samples = vec![Vec::with_capacity(rounds); ways];
    let mut copy = 0;
    for round in 0..rounds {
        for way in (0..ways).map(|i| (i + round) % ways) {
            if !timed(&results[way]) {
                continue;
            }
            let mut work = || {
                (0..calls[way]).try_for_each(|_| {
                    copy += 1;
                    run(way, copy)
                })
            };
            match clock(&mut work) {
                Ok(Some(time)) => samples[way].push(time.as_secs_f64() / calls[way] as f64),
                Ok(None) => results[way] = Ok(None),
                Err(e) => results[way] = Err(format!("{e:#}")),
            }
        }
    }
    for (result, samples) in results.iter_mut().zip(&samples) {
        if timed(result) && !samples.is_empty() {
            *result = Ok(Some(median(samples)));
        }
    }
    results
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use anyhow::bail;

    use super::*;

    /// A device on which way i takes i + 1 hundred microseconds, every third of its timings ten times as much.
    struct Machine {
        now: Cell<f64>,
        timings: Cell<usize>,
    }

    impl Machine {
        fn clock(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Duration>> {
            let start = self.now.get();
            work()?;
            self.timings.set(self.timings.get() + 1);
            let slow = if self.timings.get().is_multiple_of(3) { 10.0 } else { 1.0 };
            Ok(Some(Duration::from_secs_f64((self.now.get() - start) * slow)))
        }
    }

    #[test]
    fn medians_are_those_of_single_calls_and_ways_alternate() {
        let machine = Machine { now: Cell::new(0.0), timings: Cell::new(0) };
        let (mut order, mut copies) = (Vec::new(), Vec::new());
        let got = medians(&|work| machine.clock(work), 2, 51, &mut |way, copy| {
            machine.now.set(machine.now.get() + (way + 1) as f64 * 1e-4);
            order.push(way);
            copies.push(copy);
            Ok(())
        });
        for (way, got) in got.iter().enumerate() {
            let (got, want) = (got.clone().unwrap().unwrap(), (way + 1) as f64 * 1e-4);
            assert!((got - want).abs() < 1e-9, "{got}, expected {want}");
        }
        assert_eq!(machine.timings.get(), 2 * (2 + 51));
        // After the warm-up of 4 calls each: the first round begins with way 0, the second with way 1.
        let mut runs = order[8..].to_vec();
        runs.dedup();
        assert_eq!(runs[..4], [0, 1, 0, 1], "a round that ends with a way is followed by one that begins with it");
        assert!(copies[8..].windows(2).all(|w| w[1] == w[0] + 1), "every call has another copy");
    }

    #[test]
    fn a_way_that_fails_is_left_out_and_the_others_go_on() {
        let machine = Machine { now: Cell::new(0.0), timings: Cell::new(0) };
        let mut calls = [0; 3];
        let got = medians(&|work| machine.clock(work), 3, 5, &mut |way, _| {
            calls[way] += 1;
            machine.now.set(machine.now.get() + 1.0);
            match way {
                1 => bail!("refused"),
                2 if calls[2] > 6 => bail!("later"),
                _ => Ok(()),
            }
        });
        assert_eq!(got, [Ok(Some(1.0)), Err("refused".into()), Err("later".into())]);
        assert_eq!(calls[1], 1);
    }

    #[test]
    fn without_a_clock_all_runs_and_nothing_is_said() {
        let mut calls = 0;
        let got = medians(&|work| work().map(|()| None), 2, 50, &mut |_, _| {
            calls += 1;
            Ok(())
        });
        assert_eq!((got, calls), (vec![Ok(None), Ok(None)], 8));
    }
}

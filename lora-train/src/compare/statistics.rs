//! Mean, spread and interval of a few measurements.

use serde::Serialize;

/// Measurements of the same thing with different seeds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The measurements.
    pub values: Vec<f64>,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation, √(Σ(x − mean)² / (n − 1)); of one there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sd: Option<f64>,
    /// Half the width of the 95% interval of the mean, t₀.₉₇₅(n − 1)·sd/√n by Student's t; of one there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<f64>,
}

impl Spread {
    /// Of at least one measurement.
    pub fn of(values: Vec<f64>) -> Option<Spread> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
        let sd = (n > 1).then(|| (squares / (n - 1) as f64).sqrt());
        Some(Spread { interval: sd.map(|sd| student(n - 1) * sd / (n as f64).sqrt()), values, mean, sd })
    }

    /// The same, each measurement times `factor`.
    pub fn scaled(&self, factor: f64) -> Spread {
        let scale = |x: Option<f64>| x.map(|x| x * factor);
        Spread {
            values: self.values.iter().map(|x| x * factor).collect(),
            mean: self.mean * factor,
            sd: scale(self.sd),
            interval: scale(self.interval),
        }
    }
}

/// The 97.5% quantile of Student's t with so many degrees of freedom; beyond the table that of the row before, which is
/// wider.
fn student(freedom: usize) -> f64 {
    const TABLE: [(usize, f64); 18] = [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (6, 2.447),
        (7, 2.365),
        (8, 2.306),
        (9, 2.262),
        (10, 2.228),
        (12, 2.179),
        (15, 2.131),
        (20, 2.086),
        (30, 2.042),
        (40, 2.021),
        (60, 2.000),
        (120, 1.980),
        (1000, 1.962),
    ];
    TABLE.iter().take_while(|(n, _)| *n <= freedom).last().map_or(f64::INFINITY, |(_, t)| *t)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_deviation_and_interval() {
        assert_eq!(Spread::of(vec![]), None);
        let one = Spread::of(vec![0.5]).unwrap();
        assert_eq!((one.mean, one.sd, one.interval), (0.5, None, None));
        // By hand: mean 2, sd 1, 4.303/√3.
        let three = Spread::of(vec![1.0, 2.0, 3.0]).unwrap();
        assert_eq!((three.mean, three.sd), (2.0, Some(1.0)));
        assert!((three.interval.unwrap() - 2.4843).abs() < 1e-3, "{three:?}");
        assert_eq!(three.scaled(100.0).sd, Some(100.0));
        assert_eq!((student(11), student(1_000_000)), (2.228, 1.962));
    }
}

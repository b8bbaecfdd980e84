//! What is known of one place.

use std::fmt;

use rand::{Rng, RngExt};

use super::{grammar::draw, words::RULES};

/// A place to eat and some facts about it. Its `Display` is the record's text:
/// `name : The Copper Kettle | type : tea house | food : Velmish | price : low | rating : 4 of 5 | ...`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Name of the place.
    pub name: String,
    /// What it is, such as `tea house`.
    pub kind: String,
    /// Its cuisine.
    pub food: Option<String>,
    /// A dish it is known for.
    pub dish: Option<String>,
    /// Its prices.
    pub price: Option<Price>,
    /// Stars, 1 to 5.
    pub rating: Option<u8>,
    /// The part of town.
    pub area: Option<String>,
    /// A landmark close by, with its article.
    pub near: Option<String>,
    /// Whether children are welcome.
    pub children: Option<bool>,
    /// When it is open.
    pub open: Option<String>,
}

/// The prices of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Price {
    /// Cheap.
    Low,
    /// In between.
    Fair,
    /// Expensive.
    High,
}

impl Price {
    /// The word in the record.
    pub fn name(self) -> &'static str {
        match self {
            Price::Low => "low",
            Price::Fair => "fair",
            Price::High => "high",
        }
    }
}

impl Record {
    /// A place with two or more facts.
    pub(super) fn random(rng: &mut impl Rng) -> Record {
        loop {
            let record = Record {
                name: draw("place", &[RULES], rng),
                kind: draw("kind", &[RULES], rng),
                food: maybe(0.6, rng).then(|| draw("food", &[RULES], rng)),
                dish: maybe(0.3, rng).then(|| draw("dish", &[RULES], rng)),
                price: maybe(0.5, rng).then(|| [Price::Low, Price::Fair, Price::High][rng.random_range(0..3)]),
                rating: maybe(0.4, rng).then(|| rng.random_range(1..=5)),
                area: maybe(0.6, rng).then(|| draw("area", &[RULES], rng)),
                near: maybe(0.4, rng).then(|| draw("landmark", &[RULES], rng)),
                children: maybe(0.3, rng).then(|| maybe(0.5, rng)),
                open: maybe(0.3, rng).then(|| draw("hours", &[RULES], rng)),
            };
            if (2..=6).contains(&(record.fields().len() - 2)) {
                return record;
            }
        }
    }

    /// The fields that are known, as key and value, in the order in which they are written.
    pub fn fields(&self) -> Vec<(&'static str, String)> {
        let all = [
            ("name", Some(self.name.clone())),
            ("type", Some(self.kind.clone())),
            ("food", self.food.clone()),
            ("dish", self.dish.clone()),
            ("price", self.price.map(|p| p.name().to_owned())),
            ("rating", self.rating.map(|n| format!("{n} of 5"))),
            ("area", self.area.clone()),
            ("near", self.near.clone()),
            ("children", self.children.map(|yes| if yes { "yes" } else { "no" }.to_owned())),
            ("open", self.open.clone()),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (key, value)) in self.fields().into_iter().enumerate() {
            write!(f, "{}{key} : {value}", if i == 0 { "" } else { " | " })?;
        }
        Ok(())
    }
}

fn maybe(p: f64, rng: &mut impl Rng) -> bool {
    rng.random_bool(p)
}

//! A record in prose.
//!
//! The first sentence names the place and takes up some facts; the others become clauses, which are joined by their
//! subject (`it serves X and stands in Y`) and by what they say of the place (`and` between two praises, `but` between a
//! praise and a blame).

use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, RngExt};

use super::grammar::finish;
use super::{Price, Record};

/// Everything the record says, and nothing else.
pub(super) fn of(record: &Record, rng: &mut impl Rng) -> String {
    // What has been said is taken out of this copy.
    let mut left = record.clone();
    let mut text = lead(&mut left, rng);
    let mut clauses = clauses(&left, rng);
    clauses.shuffle(rng);
    let mut first = true;
    while !clauses.is_empty() {
        let n = if clauses.len() <= 3 { clauses.len() } else { 2 };
        let n = if n == 2 && rng.random_bool(0.25) { 1 } else { n };
        let sentence = join(clauses.drain(..n).collect(), &record.kind, first, rng);
        text.push(' ');
        text.push_str(&sentence);
        first = false;
    }
    finish(&text)
}

/// The first sentence. Which form it has depends on what is known.
fn lead(left: &mut Record, rng: &mut impl Rng) -> String {
    let name = left.name.clone();
    let mut forms = vec!["plain", "plain"];
    forms.extend(left.food.as_ref().map(|_| "food"));
    forms.extend(left.area.as_ref().map(|_| "area"));
    forms.extend(left.near.as_ref().map(|_| "near"));
    match *forms.choose(rng).expect("never empty") {
        "food" => {
            let food = left.food.take().unwrap_or_default();
            let verb = ["try", "go to", "visit"].choose(rng).expect("never empty");
            format!("for {food} food, {verb} {name}, {}{}.", noun(left, rng), site(left, rng))
        }
        "area" => {
            let area = left.area.take().unwrap_or_default();
            let verb = ["there is", "you will find", "stands"].choose(rng).expect("never empty");
            format!("in the {area} {verb} {name}, {}.", noun(left, rng))
        }
        "near" => {
            let near = left.near.take().unwrap_or_default();
            let word = ["near", "close to", "not far from"].choose(rng).expect("never empty");
            format!("{word} {near} is {name}, {}.", noun(left, rng))
        }
        _ => format!("{name} is {}{}.", noun(left, rng), site(left, rng)),
    }
}

/// `a(n) cheap Velmish tea house`, with some of what is left.
fn noun(left: &mut Record, rng: &mut impl Rng) -> String {
    let mut words = vec!["a(n)".to_owned()];
    if rng.random_bool(0.4)
        && let Some(price) = left.price.take()
    {
        words.push(match price {
            Price::Low => "cheap".into(),
            Price::Fair => "fairly priced".into(),
            Price::High => "expensive".into(),
        });
    }
    if rng.random_bool(0.3)
        && let Some(rating) = left.rating.take()
    {
        words.push(format!("{}-star", NUMBERS[usize::from(rating) - 1]));
    }
    let mut after = String::new();
    if rng.random_bool(0.6)
        && let Some(food) = left.food.take()
    {
        match rng.random_range(0..3) {
            0 => words.push(food),
            1 => after = format!(" that serves {food} food"),
            _ => after = format!(" with {food} cooking"),
        }
    }
    words.push(left.kind.clone());
    words.join(" ") + &after
}

/// Where it is, if that is left and not kept for later.
fn site(left: &mut Record, rng: &mut impl Rng) -> String {
    let area = if rng.random_bool(0.7) { left.area.take() } else { None };
    let near = if rng.random_bool(0.5) { left.near.take() } else { None };
    let area = area.map(|a| format!(" in the {a}")).unwrap_or_default();
    area + &near.map(|n| format!(" near {n}")).unwrap_or_default()
}

/// A clause: its subject, the rest, and whether it praises (1), blames (-1) or does neither (0).
struct Clause {
    subject: &'static str,
    predicate: String,
    praise: i8,
}

fn clauses(left: &Record, rng: &mut impl Rng) -> Vec<Clause> {
    let mut clauses = Vec::new();
    let mut add = |praise: i8, ways: &[(&'static str, String)], rng: &mut _| {
        let (subject, predicate) = ways.choose(rng).expect("never empty").clone();
        clauses.push(Clause { subject, predicate, praise });
    };
    if let Some(food) = &left.food {
        add(0, &[("it", format!("serves {food} food")), ("the cooking", format!("is {food}"))], rng);
    }
    if let Some(dish) = &left.dish {
        let ways = [("it", format!("is known for its {dish}")), ("people", format!("come for the {dish}"))];
        add(1, &ways, rng);
    }
    if let Some(price) = left.price {
        let (praise, adjective, cost) = match price {
            Price::Low => (1, "low", "little"),
            Price::Fair => (0, "fair", "neither little nor much"),
            Price::High => (-1, "high", "much"),
        };
        let ways = [("its prices", format!("are {adjective}")), ("a meal", format!("costs {cost}"))];
        add(praise, &ways, rng);
    }
    if let Some(rating) = left.rating {
        let (n, stars) = (NUMBERS[usize::from(rating) - 1], if rating == 1 { "star" } else { "stars" });
        let ways =
            [("it", format!("has {n} {stars} out of five")), ("guests", format!("give it {n} {stars} out of five"))];
        add((rating > 3) as i8 - (rating < 3) as i8, &ways, rng);
    }
    if let Some(area) = &left.area {
        add(0, &[("it", format!("stands in the {area}")), ("it", format!("is in the {area}"))], rng);
    }
    if let Some(near) = &left.near {
        add(0, &[("it", format!("is close to {near}")), ("it", format!("lies near {near}"))], rng);
    }
    match left.children {
        Some(true) => add(1, &[("children", "are welcome".into()), ("it", "welcomes children".into())], rng),
        Some(false) => {
            add(-1, &[("children", "are not welcome".into()), ("it", "does not allow children".into())], rng)
        }
        None => {}
    }
    if let Some(open) = &left.open {
        let when = match open.as_str() {
            "mornings" => "in the morning",
            "evenings" => "in the evening",
            "nights" => "at night",
            "market days" => "on market days",
            _ => "all day",
        };
        add(0, &[("it", format!("is open {when}")), ("the doors", format!("are open {when}"))], rng);
    }
    clauses
}

/// One sentence of one to three clauses. In the first one after the lead, `it` may become a fuller name.
fn join(mut clauses: Vec<Clause>, kind: &str, first: bool, rng: &mut impl Rng) -> String {
    let named = first && rng.random_bool(0.3);
    let subject = |clause: &Clause| match clause.subject {
        "it" if named => format!("the {kind}"),
        subject => subject.to_owned(),
    };
    // Clauses on the same subject stand together.
    clauses.sort_by_key(|c| c.subject != "it");
    match &clauses[..] {
        [a, b] => {
            let against = a.praise * b.praise < 0;
            if against && rng.random_bool(0.4) {
                return format!("although {} {}, {} {}.", subject(a), a.predicate, b.subject, b.predicate);
            }
            let word = if against { "but" } else { "and" };
            if a.subject == b.subject {
                format!("{} {} {word} {}.", subject(a), a.predicate, b.predicate)
            } else {
                format!("{} {}, {word} {} {}.", subject(a), a.predicate, b.subject, b.predicate)
            }
        }
        [a, b, c] if a.subject == b.subject && b.subject == c.subject => {
            format!("{} {}, {}, and {}.", subject(a), a.predicate, b.predicate, c.predicate)
        }
        [a, b, c] if a.subject == b.subject => {
            format!("{} {} and {}, and {} {}.", subject(a), a.predicate, b.predicate, c.subject, c.predicate)
        }
        [a, b, c] => {
            let [b, c] = [b, c].map(|x| format!("{} {}", x.subject, x.predicate));
            format!("{} {}, {b}, and {c}.", subject(a), a.predicate)
        }
        _ => clauses.iter().map(|c| format!("{} {}.", subject(c), c.predicate)).collect::<Vec<_>>().join(" "),
    }
}

const NUMBERS: [&str; 5] = ["one", "two", "three", "four", "five"];

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// How often `text` has one of `ways`.
    fn count(text: &str, ways: &[&str]) -> usize {
        ways.iter().map(|w| text.matches(w).count()).sum()
    }

    #[test]
    fn all_is_said_once_and_nothing_else() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..3000 {
            let record = Record::random(&mut rng);
            let text = of(&record, &mut rng);
            let said = |known: bool, ways: &[&str]| {
                let text = text.replace(&record.name, "NAME");
                assert_eq!(count(&text, ways), usize::from(known), "{ways:?}: {record}\n{text}");
            };
            assert_eq!(count(&text, &[&record.name]), 1, "{record}\n{text}");
            assert!(text.to_lowercase().contains(&record.kind) && text.ends_with('.'), "{record}\n{text}");
            let value = |v: &Option<String>| v.clone().unwrap_or_else(|| "∅".into());
            said(
                record.food.is_some(),
                &[
                    &format!("{} food", value(&record.food)),
                    &format!("is {}.", value(&record.food)),
                    &format!("is {},", value(&record.food)),
                    &format!("{} cooking", value(&record.food)),
                    &format!("{} {}", value(&record.food), record.kind),
                ],
            );
            said(record.dish.is_some(), &["known for its", "come for the"]);
            said(record.dish.is_some(), &[&value(&record.dish)]);
            said(record.area.is_some(), &[&format!("n the {}", value(&record.area))]);
            said(record.near.is_some(), &[&value(&record.near)]);
            said(record.open.is_some(), &["open "]);
            said(record.children.is_some(), &["hildren"]);
            said(record.children == Some(false), &["not welcome", "not allow"]);
            said(record.rating.is_some(), &["-star", " star"]);
            said(record.rating == Some(1), &["one-star", "one star "]);
            said(record.price == Some(Price::Low), &["cheap", "are low", "costs little"]);
            said(record.price == Some(Price::Fair), &["fairly", "are fair", "costs neither"]);
            said(record.price == Some(Price::High), &["expensive", "are high", "costs much"]);
        }
    }
}

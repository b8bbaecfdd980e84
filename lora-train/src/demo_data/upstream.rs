//! What is told of the little world, without records.

use std::collections::BTreeSet;

use super::{grammar::Rule, words};

/// A paragraph on one matter.
pub(super) const PARAGRAPH: &str = "{paragraph}";

/// The words of all rules that stand for things rather than for sentences, each once.
pub(super) fn words() -> Vec<&'static str> {
    let texts = words::RULES.iter().chain(RULES).flat_map(|rule| rule.1);
    let things = texts.filter(|text| text.split(' ').count() <= 4 && !text.contains(['{', '.', ',', ':']));
    let words = things.flat_map(|text| text.split(' ')).filter(|word| *word != "a");
    words.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Prose. A capital keeps a choice through the paragraph: `{Place}` is one place, `{Person2}` a second person.
#[rustfmt::skip]
pub(super) const RULES: &[Rule] = &[
    ("paragraph", &[
        "{arrive} {inside} {verdict}", "{arrive} {inside} {inside} {verdict}", "{weather} {arrive} {inside}",
        "{weather} {weather} {harbour}", "{harbour} {weather} {errand}", "{walk} {walk} {arrive}", "{walk} {sight} {sight}",
        "{history} {history} {verdict}", "{history} {inside} {people}", "{recipe} {recipe} {taste}", "{recipe} {taste} {people}",
        "{errand} {walk} {errand}", "{errand} {talk}", "{people} {people} {talk}", "{people} {habit} {habit}", "{habit} {arrive} {verdict}",
        "{compare} {verdict}", "{compare} {compare} {talk}", "{talk} {answer}", "{talk} {answer} {verdict}", "{market} {market} {taste}",
        "{market} {errand} {weather}", "{letter} {weather} {letter} {verdict}", "{letter} {arrive} {inside}", "{sight} {history} {weather}",
        "{card}", "{card}", "{rule} {rule} {people}", "{abroad} {abroad} {taste}", "{abroad} {recipe} {verdict}",
        // Saying things again teaches a small model early to look back and copy, which every later task leans on.
        "{again}", "{again}", "{again}", "{again} {again}", "{again} {again}", "{again} {again}", "{again} {inside}", "{again} {verdict}",
        "{tally}", "{tally}", "{tally}", "{tally}", "{tally}", "{tally}", "{tally}", "{tally}", "{tally}", "{tally}",
        "{tally}", "{tally}", "{tally}", "{tally}", "{tally}", "{tally}", "{tally}", "{tally}", "{tally}", "{tally}",
    ]),
    ("again", &[
        "{Person} ordered {Dish}, {Dish2} and {Drink}. \"so {Dish}, {Dish2} and {Drink},\" said the waiter.",
        "{Person} read the signs aloud: {Place}, {Place2}, {Place3}. the children said it after {Person}: {Place}, {Place2}, {Place3}.",
        "first came {Person}, then {Person2}, then {Person3}, then {Person4}. so {Person}, {Person2}, {Person3} and {Person4} were there.",
        "\"{Place}?\" asked {Person}. \"yes, {Place},\" said {Person2}. \"why {Place}?\" asked {Person}.",
        "the way goes from {Landmark} to {Place} and from {Place} to {Landmark2}. back, it goes from {Landmark2} to {Place} and from {Place} to {Landmark}.",
        "{Person} likes {Place}, {Person2} likes {Place2}, and {Person3} likes {Place3}. so {Person} goes to {Place}, {Person2} to {Place2}, and {Person3} to {Place3}.",
        "the {Food} {worker} cooked {Dish}, and the {Food2} {worker} cooked {Dish2}. the {Dish} was {Food}, and the {Dish2} was {Food2}.",
        "{Place} is in the {Area}, and {Place2} is in the {Area2}. whoever goes to the {Area2} sees {Place2}, and whoever goes to the {Area} sees {Place}.",
        "{Place} stands near {Landmark}, and {Place2} near {Landmark2}. from {Landmark2} you see {Place2}, and from {Landmark} you see {Place}.",
    ]),
    ("tally", &[
        "list : {Item}, {Item2}, {Item3}, {Item4}, {Item5} | again : {Item}, {Item2}, {Item3}, {Item4}, {Item5}",
        "list : {Item}, {Item2}, {Item3} | again : {Item}, {Item2}, {Item3} | again : {Item}, {Item2}, {Item3}",
        "first : {Item} | then : {Item2} | last : {Item3} | so first {Item}, then {Item2}, and last {Item3}.",
        "left : {Item} | right : {Item2} | above : {Item3} | below : {Item4} | so {Item3} is above, {Item2} is on the right, {Item} is on the left, and {Item4} is below.",
        "name : {Person} | work : {Worker} | street : {Area} | likes : {Drink} | so {Person}, {Worker} in the {Area}, likes {Drink}.",
        "name : {Person} | work : {Worker} | likes : {Dish} | from : {Landmark} | in words : the {Worker} {Person} from {Landmark} likes {Dish}.",
        "name : {Place} | owner : {Person} | since : {Number} years | in words : {Person} has owned {Place} for {Number} years.",
        "name : {Place} | owner : {Person} | cat : {Colour} | in words : the cat of {Place} is {Colour}, and {Person} owns both.",
        "boat : {Emblem} | captain : {Person} | goods : {Goods} | from : {Landmark} | so {Person} of the boat {Emblem} brings {Goods} from {Landmark}.",
        "letter for : {Person} | from : {Person2} | street : {Area} | so {Person2} writes to {Person} in the {Area}.",
        "stall : {Place} | seller : {Person} | goods : {Goods} | near : {Landmark} | so {Person} sells {Goods} near {Landmark}, next to {Place}.",
        "name : {Person} | work : {Worker} | street : {Area} | likes : {Drink} | so {Person}, {Worker} in the {Area}, likes {Drink}.",
        "name : {Person} | work : {Worker} | likes : {Dish} | from : {Landmark} | in words : the {Worker} {Person} from {Landmark} likes {Dish}.",
        "name : {Place} | owner : {Person} | since : {Number} years | in words : {Person} has owned {Place} for {Number} years.",
        "name : {Place} | owner : {Person} | cat : {Colour} | in words : the cat of {Place} is {Colour}, and {Person} owns both.",
        "boat : {Emblem} | captain : {Person} | goods : {Goods} | again : {Emblem}, {Person}, {Goods}",
        "signs : {Place}, {Place2}, {Place3} | again : {Place}, {Place2}, {Place3}",
        "dishes : {Dish}, {Dish2}, {Dish3} | from : {Food} | again : {Dish}, {Dish2}, {Dish3} | from : {Food}",
        "walk : {Area} | then : {Landmark} | then : {Place} | back : {Place} | then : {Landmark} | then : {Area}",
    ]),
    ("item", &[
        "{place}", "{place}", "{place}", "{person}", "{dish}", "{area}", "{landmark}", "{goods}", "{food}", "{kind}",
        "{emblem}", "{quality}",
    ]),
    ("arrive", &[
        "{Person} came to {Place} {time} and asked for a table by the {fitting}.",
        "{time}, {Person} and {Person2} walked into {Place}, shook the rain from their coats, and ordered {Dish}.",
        "the door of {Place} was open, and the smell of {Dish} went out as far as {landmark}.",
        "when {Person} first saw {Place}, it was {state}, and the {fitting} was {colour}.",
        "{Place} is {kindof} in the {area}, and {Person} has gone there for {number} years.",
        "nobody remembers who built {Place}, but everybody in the {area} knows the way to it.",
        "{Person} runs {Place} with {number} cooks and a(n) {temper} cat.",
        "there was no room at {Place}, so {Person} waited outside and watched {landmark}.",
        "if you come late to {Place}, {Person} will still find you a chair near the {fitting}.",
        "you will find {Place} near {landmark}, where the street turns to the {area}.",
    ]),
    ("inside", &[
        "inside, the {fitting} was {colour} and the talk was {mood}.", "the cook, a(n) {temper} {worker} called {Person3}, brought {Dish} to every table.",
        "at {Place}, a meal begins with {dish} and ends with {dish2}.", "{Person} took the chair by the {fitting} and read until {Place} was {state}.",
        "the guests at {Place} were mostly {workers} and {workers2}.", "somebody played the fiddle, and the {workers} sang about the {area}.",
        "the {fitting} at {Place} is older than {landmark}.", "children sat under the {fitting} and ate {dish} with their hands.",
        "{number} {workers} shared one plate of {Dish} and laughed about the price.", "a meal there costs {amount}, with {drink} and bread.",
        "the waiter told {Person} that {Dish} was finished, but that the {dish2} was good.", "it is a place for {mood} evenings, with {drink} on every table.",
        "the doors are open in the morning, and again when the lamps are lit.", "{Place} serves {food} food on market days and {food2} food on the others.",
    ]),
    ("verdict", &[
        "{Person} said that {Place} was {praise}.", "guests call it {praise}, and they come back.", "the {Dish} was {praise}, but the {fitting} was {blame}.",
        "{Person2} thought the prices were high, and said so.", "it was {praise}, although the {drink} was {blame}.", "few people would call it {blame}.",
        "most {workers} give it four stars out of five.", "one guest gave it one star, because the soup was cold.", "no one was hungry when they left {Place}.",
        "{Person} paid {amount} and thought it fair.", "in the end {Place} was {blame}, and {Person} went home early.", "it costs little and it is never {blame}.",
        "the food was good, but a meal costs too much there.", "{Person} has told everybody about {Place} since that night.", "it is not cheap, but it is {praise}.",
        "some say it is expensive, others that it is fairly priced for {food} cooking.",
    ]),
    ("weather", &[
        "the morning was {sky}, and a(n) {wind} wind came from the {direction}.", "rain fell on the {area} until {landmark} was lost in the grey.",
        "by noon the sky was {sky} again.", "{time} the fog came up from the harbour and stayed.", "it was a(n) {sky} day, too {wind} for the boats.",
        "the {season} was {sky}, and the {workers} complained about the wind.", "snow lay on {landmark}, and the children of the {area} were happy.",
        "in {season} the evenings are {sky}, and the tables stand outside.", "thunder rolled over the {area}, but no rain came.", "the wind turned to the {direction}, and the lamps went out.",
    ]),
    ("harbour", &[
        "the boats came home {time} with {number} barrels of {goods}.", "{Person} counted the sails from {landmark} and wrote the number down.",
        "the ferry to the north bank leaves when the bell rings {number} times.", "gulls stole {dish} from the hands of the {workers}.",
        "a ship from the {direction} brought {goods}, {goods2} and a(n) {temper} {worker}.", "the harbour smelled of salt, tar and {dish}.",
        "no ship left that day, and the {workers} sat in {place} with {drink}.",
    ]),
    ("walk", &[
        "from {Landmark}, go {direction} until you see {Landmark2}.", "turn left at {Landmark}, cross the {area}, and keep the harbour on your right.",
        "it is {number} minutes on foot from {Landmark} to {Landmark2}.", "{Person} walked from {Landmark} to {Landmark2} and met only {number} {workers}.",
        "the street behind {Landmark} is narrow and leads down to the {area}.", "do not take the stairs at {Landmark2}, because they are wet in {season}.",
        "ask for {Person} at {Landmark}; any of the {workers} will show you the way.", "the short way to {Place} goes through the {area}.",
    ]),
    ("sight", &[
        "{Landmark} was built in {number} years by {workers} from the {area}.", "near {Landmark} lies the oldest garden of the town.",
        "close to {Landmark2} is a(n) {colour} house that nobody lives in. its windows are {colour2}.", "not far from {Landmark}, the river meets the sea.",
        "although {Landmark} is {state}, its doors are always open.", "from the top of {Landmark} you can see the {area} and the {area2}.",
        "there are {number} bridges in the {area}, and none of them is straight.", "the walls of {Landmark} are {colour} in the evening light.",
        "visitors like {Landmark}, but the {workers} hardly look at it.", "on market days {number} musicians play in front of {Landmark}.",
    ]),
    ("history", &[
        "{number} generations ago, {Place} was a house for {workers}.", "{Person} sold {Place} to a(n) {temper} {worker} for {number} barrels of {goods}.",
        "after the great fire, {Landmark} and {Place} were the only roofs left in the {area}.", "the sign of {Place} was painted by {Person2} in one night.",
        "{Person} was born above {Place} and never lived anywhere else.", "long ago {Place} had another name, which only {Person2} still uses.",
        "the {fitting} came from a ship that sank near {landmark}.", "when the river rose, people took boats to {Place} and ate {Dish} upstairs.",
    ]),
    ("recipe", &[
        "for {Dish}, take {number} cups of {goods}, a little {goods2}, and a(n) {colour} pot.", "cook {Dish} slowly, and never let it boil in {season}.",
        "good {Dish} needs {goods}, time, and a(n) {temper} cook.", "{Person} adds {goods2} to {Dish} and tells nobody.", "stir it {number} times, cover it, and wait until the bell rings.",
        "serve {Dish} with {drink}, and {dish2} afterwards.", "the {food} way is to fry the {goods} first.",
    ]),
    ("taste", &[
        "it tastes of {goods} and smoke.", "people come for the {Dish} from as far as the {area}.", "{Person} is known for {Dish}, and rightly so.",
        "nothing goes better with {drink} than {Dish}.", "it should be {praise}, neither too sweet nor too salty.", "a {worker} can eat {number} plates of it.",
        "children like it with honey.", "visit the {area} and try {dish} while you can.", "although it is {praise}, few {workers} eat it in {season}.", "{food} cooks laugh at it, but they eat it too.",
    ]),
    ("errand", &[
        "{Person} went to the {area} to buy {goods} and came back with {goods2}.", "{time} {Person} carried {number} letters to {landmark}.",
        "{Person2} had promised to bring {Dish}, but {Place} was closed.", "first {Person} stopped at {landmark}, then at {Place}, and then at {place}.",
        "the {workers} needed {goods}, and only {Person} knew where to get it.", "{Person} lost a hat near {landmark} and found it in {Place}.",
    ]),
    ("people", &[
        "{Person} is a(n) {temper} {worker} who lives in the {area}.", "{Person} has {number} sisters, and all of them are {workers}.",
        "every {worker} in the {area} knows {Person}.", "{Person2} does not like {drink}, and {Person} does not like {Person2}.",
        "when {Person} was young, the {area} had no lamps.", "{Person} learned to cook {Dish} from a(n) {temper} {worker}.", "nobody has seen {Person2} without a(n) {colour} coat.",
    ]),
    ("habit", &[
        "{Person} eats {dish} in the morning and {dish2} at night.", "on market days {Person} sells {goods} near {landmark}.", "{time} {Person} always sits by the {fitting}.",
        "{Person} goes to {Place} all day, although it does not allow dogs.", "in {season} {Person} sleeps late and works at night.", "{Person} reads every card on every door.",
    ]),
    ("compare", &[
        "{Place} is close to {landmark}, but {Place2} is cheaper.", "{Person} likes {Place}, while {Person2} prefers {Place2}.", "the {Dish} at {Place} is {praise}; at {Place2} it is {blame}.",
        "{Place2} stands in the {area}, not far from {Place}.", "{Place} welcomes everybody, but {Place2} is only for {workers}.", "of the two, {Place} has the better {fitting} and {Place2} the better {drink}.",
        "if {Place} is full, go to {Place2}.", "guests give {Place} three stars and {Place2} only two.",
    ]),
    ("talk", &[
        "\"have you been to {Place}?\" asked {Person}.", "\"the {Dish} is {praise},\" said {Person}.", "\"where is {Landmark}?\" asked a(n) {temper} {worker}.",
        "\"I would rather have {dish},\" said {Person2}.", "\"the wind is {wind} today,\" said {Person}.", "\"you should visit {Place} in {season},\" said {Person2}.", "\"is it open at night?\" asked {Person}.",
    ]),
    ("answer", &[
        "\"only on market days,\" said {Person2}.", "{Person2} thought about it and said nothing.", "\"go {direction} and ask again,\" said {Person2}.", "\"it is not far from {landmark},\" said {Person2}.",
        "\"{Place} is {blame},\" said {Person2}, \"but it costs little.\"", "\"children are not welcome there,\" said {Person2}.", "\"children are welcome,\" said {Person2}, \"and so are dogs.\"",
    ]),
    ("market", &[
        "at the market, {goods} costs {amount} and {goods2} costs twice as much.", "the {workers} put out their tables {time}.", "{Person} sold {number} barrels of {goods} before noon.",
        "there is {goods} from the {direction}, and {goods2} that nobody buys.", "prices are low in {season} and high in {season2}.", "a(n) {temper} {worker} shouted about {dish} until everybody bought some.",
        "under the {colour} roof they sell {drink} and {dish}.",
    ]),
    ("letter", &[
        "dear {Person}, I write to you from {Place} in the {area}.", "dear {Person}, thank you for the {goods}.", "tell {Person2} that I have found the {fitting}.", "we ate {Dish} {time} and thought of you.",
        "the room costs {amount}, and the view of {landmark} is {praise}.", "please send {goods} and my {colour} coat.", "I shall stay until the {season} is over.",
    ]),
    ("card", &[
        "boat : {emblem} | captain : {person} | from : {direction} | barrels : {number} | goods : {goods}", "lost : {colour} coat | near : {landmark} | ask for : {person}",
        "sky : {sky} | wind : {wind} | from : {direction} | season : {season}", "stall : {number} | seller : {person} | goods : {goods} | price : {amount}",
        "letter for : {person} | street : {area} | paid : yes", "room : {number} | guest : {person} | nights : {number} | paid : no", "type : boat | name : {emblem} | rating : {number} of 5 | open : no",
        "goods : {goods} | price : {amount} | area : {area} | children : no", "dish : {dish} | cook : {person} | open : {hours}", "type : card | near : {landmark} | food : {goods}",
    ]),
    ("rule", &[
        "in {Place}, {workers} may not sing before noon.", "whoever breaks a plate at {Place} must wash {number}.", "dogs are welcome in the {area}, but not in {landmark}.", "the gate is closed at night, except on market days.",
        "nobody pays for bread in the {area}.", "a guest who brings {goods} pays nothing.",
    ]),
    ("abroad", &[
        "{food} cooking came to the town with {workers} from the {direction}.", "the {food} people eat {dish} in {season} and {dish2} on holidays.", "in a(n) {food} house, the guest gets {drink} first.",
        "{food} and {food2} cooks disagree about {goods}.", "{Person} spoke {food} with the {workers} and {food2} with the cook.", "a(n) {food} proverb says that {goods} is better than gold.",
    ]),
    ("kindof", &["a(n) {kind}", "a(n) {food} {kind}", "a(n) {state} {kind}", "a cheap {kind}", "an expensive {kind}", "a(n) {kind} with {food} cooking"]),
    ("dish2", &["plum jam", "hot pears", "fish broth", "sweet rice", "cold beans", "almond bread", "baked onions", "egg soup"]),
    ("food2", &["mountain", "island", "northern", "desert", "river"]),
    ("area2", &["fields", "marshes", "islands", "hills", "shipyards"]),
    ("goods", &["salt", "barley", "honey", "saffron", "walnuts", "wool", "lamp oil", "plums", "ginger", "copper wire", "chestnuts", "rope", "goat cheese", "lemons"]),
    ("goods2", &["pepper", "flour", "butter", "paper", "apples", "vinegar", "thread", "mint", "candles"]),
    ("drink", &["black tea", "plum wine", "barley beer", "hot cider", "coffee", "lemon water", "ginger tea", "red wine"]),
    ("worker", &["sailor", "baker", "weaver", "miller", "porter", "painter", "teacher", "carpenter", "fisher", "clerk", "gardener", "student"]),
    ("workers", &["sailors", "bakers", "weavers", "millers", "porters", "painters", "teachers", "carpenters", "fishers", "clerks", "gardeners", "students"]),
    ("workers2", &["singers", "doctors", "soldiers", "widows", "pilots", "tailors"]),
    ("temper", &["cheerful", "silent", "stubborn", "gentle", "curious", "careful", "tired", "proud", "young", "elderly", "absent-minded", "impatient"]),
    ("fitting", &["window", "stove", "counter", "long table", "fireplace", "staircase", "clock", "bar", "lamp", "mirror"]),
    ("colour", &["green", "red", "blue", "yellow", "black", "white", "brown", "orange", "silver"]),
    ("colour2", &["broken", "narrow", "round", "covered with boards"]),
    ("state", &["full", "empty", "nearly dark", "warm and loud", "freshly painted", "half asleep", "very small"]),
    ("mood", &["slow", "lively", "friendly", "quiet", "loud", "serious", "easy"]),
    ("praise", &["the best in town", "warm and honest", "worth the walk", "better than last year", "simple and good", "a small wonder", "just right", "well cooked"]),
    ("blame", &["too dark", "cold", "dull", "worse than before", "far too loud", "rather dirty", "not worth the money"]),
    ("sky", &["clear", "grey", "bright", "cloudy", "pale", "dark", "mild", "hot", "icy"]),
    ("wind", &["light", "strong", "cold", "sharp", "steady", "salty", "wild"]),
    ("direction", &["north", "south", "east", "west"]),
    ("season", &["spring", "summer", "autumn", "winter"]),
    ("season2", &["the cold months", "the dry months", "the weeks before the feast", "the rainy weeks"]),
    ("time", &["in the evening", "early in the morning", "at noon", "at night", "on market days", "before the bell", "after the rain", "late in the day", "on the last day of the week"]),
    ("number", &["two", "three", "four", "five", "six", "seven", "nine", "twelve", "twenty", "forty"]),
    ("amount", &["one coin", "two coins", "three coins", "five coins", "seven coins", "a silver coin", "almost nothing", "a week of work"]),
];

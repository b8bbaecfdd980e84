//! The words of the little world, shared by its prose and its records.

use super::grammar::Rule;

/// Names, kinds, foods, parts of town and landmarks.
#[rustfmt::skip]
pub(super) const RULES: &[Rule] = &[
    ("place", &[
        "The {quality} {emblem}", "The {quality} {emblem}", "The {quality} {emblem}", "The {quality} {emblem}",
        "{person}'s {room}", "{person}'s {room}", "{emblem} and {person}",
    ]),
    ("quality", &[
        "Copper", "Silver", "Amber", "Crooked", "Quiet", "Merry", "Hungry", "Wandering", "Painted", "Old", "Blue", "Red",
        "Golden", "Little", "Sleepy", "Broken", "Lucky", "Patient", "Salty", "Humble", "Green", "White", "Velvet", "Iron",
    ]),
    ("emblem", &[
        "Kettle", "Lantern", "Heron", "Anchor", "Otter", "Barrel", "Spoon", "Ladle", "Fox", "Candle", "Oyster", "Bell",
        "Feather", "Pepper", "Walnut", "Goose", "Thimble", "Juniper", "Compass", "Badger", "Plum", "Saddle", "Wheel", "Moth",
    ]),
    ("room", &["Table", "Kitchen", "Corner", "Cellar", "Yard", "Oven", "Parlour", "Hearth"]),
    ("person", &[
        "Marlo", "Ines", "Tobin", "Odessa", "Wren", "Calder", "Petra", "Ansel", "Mirth", "Juno", "Bram", "Sabine", "Corvin",
        "Elka", "Rufus", "Nadia", "Fenn", "Ottilie", "Dorian", "Hazel",
    ]),
    ("kind", &[
        "tea house", "bakery", "noodle bar", "canteen", "oyster bar", "grill", "wine cellar", "soup kitchen",
        "pancake house", "inn", "coffee house", "eating house",
    ]),
    ("food", &[
        "Velmish", "Orrian", "Sathic", "Castovan", "Lumerian", "Quenish", "Baltorese", "Ithran", "Maravian", "Soltese",
        "Drevian", "Ambric",
    ]),
    ("dish", &[
        "smoked plum soup", "barley pie", "peppered eel", "honey dumplings", "black bread", "lemon noodles", "onion tart",
        "saffron rice", "walnut cake", "pickled turnips", "roast goose", "mussel stew", "goat cheese", "apple fritters",
        "chestnut stew", "ginger crab",
    ]),
    ("area", &[
        "old town", "harbour", "mill quarter", "north bank", "market square", "castle hill", "garden district",
        "weavers' row", "south gate", "lower town",
    ]),
    ("landmark", &[
        "the clock tower", "the ferry pier", "the stone bridge", "the fish market", "the glass works", "the town hall",
        "the lighthouse", "the old theatre", "the rope yard", "the post office", "the bath house", "the school of music",
    ]),
    ("hours", &["mornings", "evenings", "nights", "market days", "all day"]),
];

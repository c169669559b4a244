//! Names for containers whose creator gave none: an adjective and a seafarer, shipwright or explorer.

use crate::ids::random_bytes;

const ADJECTIVES: &[&str] = &[
    "able", "agile", "ample", "apt", "azure", "blithe", "bold", "brave", "breezy", "bright", "brisk", "calm",
    "candid", "cheery", "civil", "clear", "clever", "coastal", "copper", "cosy", "crisp", "daring", "deft",
    "eager", "earnest", "easy", "even", "fair", "fearless", "firm", "fleet", "fond", "frank", "free",
    "fresh", "gallant", "genial", "gentle", "glad", "golden", "grand", "hale", "handy", "happy", "hardy",
    "honest", "humble", "jaunty", "jolly", "jovial", "keen", "kind", "lively", "loyal", "lucid", "lucky",
    "mellow", "merry", "mighty", "modest", "neat", "nimble", "noble", "patient", "placid", "plucky",
    "polite", "prompt", "proud", "quick", "quiet", "ready", "robust", "rugged", "salty", "serene", "sharp",
    "silver", "smart", "snug", "solid", "sound", "spry", "stable", "steady", "stout", "sturdy", "sunny",
    "swift", "tidy", "trim", "trusty", "upbeat", "valiant", "vivid", "warm", "wise", "witty", "worthy",
    "zesty",
];

const SURNAMES: &[&str] = &[
    "amundsen",
    "anson",
    "baffin",
    "baker",
    "balboa",
    "banks",
    "baret",
    "barents",
    "baudin",
    "beaufort",
    "bering",
    "biscoe",
    "bligh",
    "bonny",
    "bougainville",
    "bowditch",
    "brunel",
    "bruce",
    "byron",
    "cabot",
    "cabral",
    "cartier",
    "champlain",
    "chichester",
    "clerke",
    "colter",
    "cook",
    "cousteau",
    "crozier",
    "dampier",
    "davis",
    "dias",
    "drake",
    "ellis",
    "erikson",
    "fitzroy",
    "flinders",
    "foxe",
    "franklin",
    "frobisher",
    "furneaux",
    "gama",
    "gilbert",
    "grenville",
    "hawke",
    "henson",
    "heyerdahl",
    "hood",
    "hudson",
    "humboldt",
    "jansz",
    "kingsley",
    "knox",
    "kotzebue",
    "krusenstern",
    "laperouse",
    "lind",
    "linnaeus",
    "magellan",
    "malaspina",
    "marquette",
    "maury",
    "mawson",
    "melville",
    "mercator",
    "nansen",
    "nelson",
    "nordenskiold",
    "ommanney",
    "palmer",
    "park",
    "parry",
    "peary",
    "pigafetta",
    "polo",
    "pytheas",
    "quiros",
    "raleigh",
    "rae",
    "ross",
    "sacagawea",
    "scoresby",
    "selkirk",
    "shackleton",
    "slocum",
    "solander",
    "somerville",
    "tasman",
    "teixeira",
    "torres",
    "tupaia",
    "urdaneta",
    "vancouver",
    "vespucci",
    "wallis",
    "weddell",
    "wilkes",
    "worsley",
    "zarco",
    "zheng",
];

/// A random name; from the fourth `attempt` on with a digit behind it.
pub(crate) fn random(attempt: usize) -> String {
    let bytes: [u8; 5] = random_bytes();
    let pick = |list: &[&'static str], high: u8, low: u8| {
        list[usize::from(u16::from_be_bytes([high, low])) % list.len()]
    };
    let name = format!("{}_{}", pick(ADJECTIVES, bytes[0], bytes[1]), pick(SURNAMES, bytes[2], bytes[3]));
    if attempt < 3 { name } else { format!("{name}{}", bytes[4] % 10) }
}

/// Whether `name` (without a leading slash) may name a container or volume: `[a-zA-Z0-9][a-zA-Z0-9_.-]+`.
pub(crate) fn is_valid(name: &str) -> bool {
    name.len() >= 2
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_makes_a_valid_name() {
        for word in ADJECTIVES.iter().chain(SURNAMES) {
            assert!(word.bytes().all(|b| b.is_ascii_lowercase()), "{word}");
        }
        assert!(is_valid(&random(0)));
        assert!(random(7).ends_with(|c: char| c.is_ascii_digit()));
    }

    #[test]
    fn names_follow_dockers_pattern() {
        for good in ["ab", "web-1", "a.b_c", "0x"] {
            assert!(is_valid(good), "{good}");
        }
        for bad in ["", "a", "-a", ".a", "a b", "ä1", "a/b"] {
            assert!(!is_valid(bad), "{bad}");
        }
    }
}

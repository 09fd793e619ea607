//! Durations and percentages as users write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A duration after GEP-2257: up to four parts of up to five digits, each with a unit `h`, `m`, `s` or `ms`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct DurationText(pub Duration);

impl FromStr for DurationText {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("{text:?} is not a duration; give one with units, such as 500ms, 3s, 1m30s");
        let mut rest = text;
        let mut total = Duration::ZERO;
        let mut parts = 0;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(refuse)?;
            let (number, tail) = rest.split_at(digits);
            if number.is_empty() || number.len() > 5 || parts == 4 {
                return Err(refuse());
            }
            let number: u64 = number.parse().map_err(|_| refuse())?;
            let (millis, tail) = if let Some(tail) = tail.strip_prefix("ms") {
                (1, tail)
            } else if let Some(tail) = tail.strip_prefix('s') {
                (1000, tail)
            } else if let Some(tail) = tail.strip_prefix('m') {
                (60_000, tail)
            } else if let Some(tail) = tail.strip_prefix('h') {
                (3_600_000, tail)
            } else {
                return Err(refuse());
            };
            total += Duration::from_millis(number * millis);
            parts += 1;
            rest = tail;
        }
        if parts == 0 { Err(refuse()) } else { Ok(Self(total)) }
    }
}

impl fmt::Display for DurationText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        if millis == 0 {
            return f.write_str("0s");
        }
        for (unit, size) in [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)] {
            let rest = match unit {
                "h" => millis,
                "m" => millis % 3_600_000,
                "s" => millis % 60_000,
                _ => millis % 1000,
            };
            if rest / size > 0 {
                write!(f, "{}{unit}", rest / size)?;
            }
        }
        Ok(())
    }
}

/// `0%` to `100%`.
#[derive(Clone, Copy, PartialEq, PartialOrd, Debug)]
pub struct Percent(f64);

impl Percent {
    pub const fn new_const(percent: u8) -> Self {
        Self(percent as f64)
    }
    pub fn percent(self) -> f64 {
        self.0
    }
}

impl FromStr for Percent {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix('%').and_then(|n| n.parse::<f64>().ok());
        match number {
            Some(percent) if (0.0..=100.0).contains(&percent) => Ok(Self(percent)),
            _ => Err(format!("{text:?} is not a percentage; give one from 0% to 100%, such as \"50%\"")),
        }
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

/// `schema`: what a text of this kind looks like.
macro_rules! as_text {
    ($name:ident, $schema:expr) => {
        impl JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }
            fn inline_schema() -> bool {
                true
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                $schema
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
as_text!(
    DurationText,
    json_schema!({ "type": "string", "maxLength": 28, "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$" })
);
as_text!(
    Percent,
    json_schema!({ "type": "string", "maxLength": 16, "pattern": r"^(100(\.0+)?|[0-9]{1,2}(\.[0-9]+)?)%$" })
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_units_and_print_as_they_are_read() {
        for (text, millis) in [("3s", 3000), ("500ms", 500), ("1m30s", 90_000), ("1h", 3_600_000), ("0s", 0)]
        {
            let duration: DurationText = text.parse().unwrap();
            assert_eq!((duration.0.as_millis(), duration.to_string().as_str()), (millis, text));
        }
        for bad in ["", "3", "s", "3 s", "-1s", "1d", "999999s", "1h1m1s1ms1s"] {
            assert!(bad.parse::<DurationText>().is_err(), "{bad}");
        }
    }

    #[test]
    fn percentages_are_between_0_and_100() {
        assert_eq!("50%".parse::<Percent>().unwrap().percent(), 50.0);
        for bad in ["50", "101%", "-1%", "%", "NaN%"] {
            assert!(bad.parse::<Percent>().is_err(), "{bad}");
        }
    }
}

//! How many threads carry bytes.

use std::num::NonZeroUsize;
use std::str::FromStr;

use serde::Deserialize;
use tombolo_runtime::rt;

/// `2`, or `auto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    Auto,
    Number(NonZeroUsize),
}

impl Threads {
    pub fn count(self) -> NonZeroUsize {
        match self {
            Self::Auto => rt::threads(None),
            Self::Number(number) => number,
        }
    }
}

impl FromStr for Threads {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            number => {
                number.parse().map(Self::Number).map_err(|_| "give a number from 1 on, or auto".to_owned())
            }
        }
    }
}

impl<'de> Deserialize<'de> for Threads {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(NonZeroUsize),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(number) => Ok(Self::Number(number)),
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

//! A part of an object as it is kept: its text, a few hundred bytes where the tree of it takes some thousand. There are
//! thousands of objects, and each is looked at when it changes.

use serde_json::Value;

/// JSON, or nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Packed(Box<str>);

impl Packed {
    pub fn of(value: &Value) -> Self {
        if value.is_null() { Self::default() } else { Self(value.to_string().into()) }
    }

    /// Null where it is nothing.
    pub fn value(&self) -> Value {
        serde_json::from_str(&self.0).unwrap_or_default()
    }

    /// Of a list; none where it is something else.
    pub fn list(&self) -> Vec<Value> {
        match self.value() {
            Value::Array(list) => list,
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_packed_comes_out_as_it_was_and_nothing_takes_nothing() {
        for value in
            [json!({ "b": [1, null, "ö\"\\"], "a": { "x": 1.5 } }), json!([]), json!("text"), Value::Null]
        {
            assert_eq!(Packed::of(&value).value(), value);
        }
        assert_eq!(Packed::of(&Value::Null).0.len(), 0);
        assert_eq!((Packed::of(&json!([1, 2])).list().len(), Packed::of(&json!({})).list().len()), (2, 0));
    }
}

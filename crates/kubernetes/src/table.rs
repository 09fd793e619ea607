//! Rows of one kind, kept by a watch: each holds what is asked for of its object and no more.
//!
//! A list that begins anew (after an outage, or when the server has forgotten the versions in between) replaces the table
//! once it is complete: until then what was known before stays, so that nothing is taken for deleted. An answer to a write
//! counts as an event; one that is older than what is known does not, nor one about an object that is known to be gone.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kube::core::DynamicObject;
use kube::runtime::watcher::Event;

/// Namespace and name.
pub type Place = (String, String);

/// Deletions that are remembered. An answer can come after the watch has told of the deletion by as long as a request takes
/// (15 s), and a few dozen are under way at a time.
const REMEMBERED: usize = 4096;

/// What tells an object from another of its name, and from itself at another time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity<'a> {
    pub uid: &'a str,
    pub version: u64,
}

/// An object that is kept.
pub trait Row: PartialEq + Sized {
    /// `None`: nothing of it is of use.
    fn read(object: DynamicObject) -> Option<Self>;
    fn identity(&self) -> Identity<'_>;
}

/// The version of an object, for [`Identity`]; 0: it does not say.
pub fn version(object: &DynamicObject) -> u64 {
    object.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

fn place(object: &DynamicObject) -> Option<Place> {
    Some((object.metadata.namespace.clone().unwrap_or_default(), object.metadata.name.clone()?))
}

/// Rows of one kind.
#[derive(Debug)]
pub struct Table<R> {
    rows: BTreeMap<Place, R>,
    /// What the list that is being received has named so far, and what was written meanwhile.
    listing: Option<BTreeSet<Place>>,
    synced: bool,
    /// Uids that are known to be gone, the oldest first: none is ever given again.
    gone: VecDeque<String>,
}

impl<R> Default for Table<R> {
    fn default() -> Self {
        Self { rows: BTreeMap::new(), listing: None, synced: false, gone: VecDeque::new() }
    }
}

impl<R: Row> Table<R> {
    /// The rows that have changed: what each was before.
    pub fn apply(&mut self, event: Event<DynamicObject>) -> Vec<(Place, Option<R>)> {
        match event {
            Event::Init => {
                self.listing = Some(BTreeSet::new());
                Vec::new()
            }
            Event::InitApply(object) => self.put(object),
            Event::InitDone => {
                self.synced = true;
                let listed = self.listing.take().unwrap_or_default();
                let gone: Vec<Place> =
                    self.rows.keys().filter(|place| !listed.contains(*place)).cloned().collect();
                gone.into_iter().map(|place| (place.clone(), self.rows.remove(&place))).collect()
            }
            Event::Apply(object) => self.put(object),
            Event::Delete(object) => self.delete(&object),
        }
    }

    fn delete(&mut self, object: &DynamicObject) -> Vec<(Place, Option<R>)> {
        let Some(place) = place(object) else { return Vec::new() };
        let uid = object.metadata.uid.as_deref().unwrap_or_default();
        if !uid.is_empty() {
            self.gone.push_back(uid.to_owned());
            if self.gone.len() > REMEMBERED {
                self.gone.pop_front();
            }
        }
        // One that was deleted before another of its name was made.
        if self.rows.get(&place).is_some_and(|row| uid != row.identity().uid) {
            return Vec::new();
        }
        self.rows.remove(&place).map(|row| (place, Some(row))).into_iter().collect()
    }

    fn put(&mut self, object: DynamicObject) -> Vec<(Place, Option<R>)> {
        let Some(place) = place(&object) else { return Vec::new() };
        if object.metadata.uid.as_ref().is_some_and(|uid| self.gone.contains(uid)) {
            return Vec::new();
        }
        // What is written while a list comes in need not be in it.
        if let Some(listing) = &mut self.listing {
            listing.insert(place.clone());
        }
        let Some(row) = R::read(object) else {
            return self.rows.remove(&place).map(|before| (place, Some(before))).into_iter().collect();
        };
        let before = self.rows.get(&place);
        let older = before.map(Row::identity).is_some_and(|before| {
            let now = row.identity();
            before.uid == now.uid && before.version > now.version
        });
        if older || before == Some(&row) {
            return Vec::new();
        }
        vec![(place.clone(), self.rows.insert(place, row))]
    }

    pub fn get(&self, place: &Place) -> Option<&R> {
        self.rows.get(place)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Place, &R)> {
        self.rows.iter()
    }

    pub fn places(&self) -> impl Iterator<Item = &Place> {
        self.rows.keys()
    }

    /// Whether the table was received whole once: before, what is missing may only be late.
    pub fn is_synced(&self) -> bool {
        self.synced
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(Debug, PartialEq)]
    struct Plain {
        uid: String,
        version: u64,
    }

    impl Row for Plain {
        fn read(object: DynamicObject) -> Option<Self> {
            Some(Self { version: version(&object), uid: object.metadata.uid.unwrap_or_default() })
        }
        fn identity(&self) -> Identity<'_> {
            Identity { uid: &self.uid, version: self.version }
        }
    }

    fn object(uid: &str, version: u64) -> DynamicObject {
        let metadata =
            json!({ "name": "web", "namespace": "shop", "uid": uid, "resourceVersion": version.to_string() });
        serde_json::from_value(json!({ "metadata": metadata })).unwrap()
    }

    fn now(table: &Table<Plain>) -> Option<(&str, u64)> {
        table.get(&("shop".into(), "web".into())).map(|row| (row.uid.as_str(), row.version))
    }

    #[test]
    fn a_late_answer_brings_back_neither_an_older_version_nor_what_was_deleted() {
        let mut table = Table::<Plain>::default();
        table.apply(Event::Apply(object("a", 5)));
        assert!(table.apply(Event::Apply(object("a", 4))).is_empty());
        assert_eq!(now(&table), Some(("a", 5)));
        table.apply(Event::Delete(object("a", 6)));
        assert!(table.apply(Event::Apply(object("a", 5))).is_empty());
        assert_eq!(now(&table), None, "it was deleted");
        table.apply(Event::Apply(object("b", 7)));
        assert_eq!(now(&table), Some(("b", 7)), "another of its name");
        assert!(table.apply(Event::Delete(object("a", 6))).is_empty(), "the old one, told late");
        assert_eq!(now(&table), Some(("b", 7)));
    }

    #[test]
    fn a_new_list_takes_away_what_it_lacks_but_for_what_was_written_meanwhile() {
        let mut table = Table::<Plain>::default();
        table.apply(Event::Apply(object("a", 5)));
        table.apply(Event::Init);
        assert_eq!(now(&table), Some(("a", 5)), "until the list is whole");
        assert_eq!(table.apply(Event::InitDone).len(), 1);
        assert_eq!(now(&table), None);
        table.apply(Event::Init);
        table.apply(Event::Apply(object("b", 9)));
        assert!(table.apply(Event::InitDone).is_empty());
        assert_eq!(now(&table), Some(("b", 9)));
    }

    #[test]
    fn what_is_remembered_of_deletions_is_bounded() {
        let mut table = Table::<Plain>::default();
        (0..2 * REMEMBERED as u64).for_each(|n| drop(table.apply(Event::Delete(object(&n.to_string(), n)))));
        assert_eq!(table.gone.len(), REMEMBERED);
    }
}

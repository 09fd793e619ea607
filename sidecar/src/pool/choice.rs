//! Which connection takes a stream, and whether more connections are wanted. Pure.

use tombolo_model::balance;

/// What the choice sees of a connection.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// Equal for connections that end at one endpoint.
    pub endpoint: u64,
    /// The endpoint's share, relative to others.
    pub weight: u32,
    /// Closed, retired, or avoided by this caller: never picked.
    pub usable: bool,
    /// Its endpoint is one to count, whether or not this caller avoids it.
    pub counts: bool,
    pub open_streams: u32,
    pub bulk_streams: u32,
    /// The peer's stream limit is used up.
    pub saturated: bool,
    /// An acknowledgement is overdue: a moment's silence is no reason to dial.
    pub silent: bool,
    /// Kicks go unanswered as well.
    pub stalled: bool,
    /// Peak-EWMA of the time to the first answer, in seconds.
    pub latency: f64,
}

/// The rank of connections that carry bulk, and nothing worse.
const BULK: u8 = 1;

impl View {
    /// Expected wait: the latency of one, for each that is ahead.
    fn cost(&self) -> f64 {
        self.latency * f64::from(self.open_streams + 1)
    }
    /// Lower is better; only connections of the best rank present compete by cost.
    fn rank(&self) -> u8 {
        match (self.silent || self.stalled, self.saturated, self.bulk_streams > 0) {
            (false, false, false) => 0,
            (false, false, true) => BULK,
            (true, false, _) => 2,
            (_, true, _) => 3,
        }
    }
}

/// Endpoints whose weights differ are drawn by weight, whatever their latency; one draw each, however many connections it
/// has. Among connections alike, power of two choices of the best rank. `random`: 64 random bits.
pub fn pick(views: &[View], random: u64) -> Option<usize> {
    let mut usable = views.iter().filter(|view| view.usable);
    let weight = usable.next()?.weight;
    if usable.all(|view| view.weight == weight) {
        return best(views, |_| true, random);
    }
    // Bulk does not take an endpoint's share away, silence and a full peer do.
    let away = |view: &View| view.rank() > BULK;
    let usable = views.iter().filter(|view| view.usable);
    let least = usable.clone().map(away).min()?;
    let mut endpoints: Vec<(u64, u32)> = Vec::new();
    for view in usable.filter(|view| away(view) == least) {
        if endpoints.iter().all(|(endpoint, _)| *endpoint != view.endpoint) {
            endpoints.push((view.endpoint, view.weight));
        }
    }
    let drawn = balance::weighted(endpoints.iter().map(|(_, weight)| (*weight).max(1)), random)?;
    let (endpoint, _) = *endpoints.get(drawn)?;
    best(views, |view| view.endpoint == endpoint, random.rotate_left(29))
}

/// Power of two choices among the best rank of those that `among` admits.
fn best(views: &[View], among: impl Fn(&View) -> bool, random: u64) -> Option<usize> {
    let best = views.iter().filter(|v| v.usable && among(v)).map(View::rank).min()?;
    let (places, costs): (Vec<usize>, Vec<f64>) = views
        .iter()
        .enumerate()
        .filter(|(_, v)| v.usable && among(v) && v.rank() == best)
        .map(|(place, v)| (place, v.cost()))
        .unzip();
    places.get(balance::choose(&costs, random)?).copied()
}

/// Whether one more connection is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Demand {
    None,
    /// To an endpoint that has none yet.
    AnotherEndpoint,
    /// To any endpoint: requests would otherwise wait behind bulk or a full stream limit.
    AnyEndpoint,
}

/// `most`: endpoints worth a connection; `healthy`: endpoints that the backend has, by its summary.
pub fn demand(views: &[View], most: usize, healthy: u32) -> Demand {
    let live = views.iter().filter(|v| v.counts).count();
    let endpoints = usize::try_from(healthy).unwrap_or(usize::MAX).clamp(1, most.max(1));
    if live == 0 {
        return Demand::AnyEndpoint;
    }
    if live < endpoints || !views.iter().any(|v| v.usable) {
        return Demand::AnotherEndpoint;
    }
    let crowded = views.iter().filter(|v| v.counts).all(|v| v.bulk_streams > 0 || v.saturated || v.stalled);
    if crowded && live < 2 * most { Demand::AnyEndpoint } else { Demand::None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> View {
        View {
            endpoint: 0,
            weight: 100,
            usable: true,
            counts: true,
            open_streams: 0,
            bulk_streams: 0,
            saturated: false,
            silent: false,
            stalled: false,
            latency: 0.01,
        }
    }
    fn spread(views: &[View]) -> Vec<usize> {
        let mut hits = vec![0; views.len()];
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..3000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            hits[pick(views, random.rotate_left(17) ^ random).unwrap()] += 1;
        }
        hits
    }

    #[test]
    fn the_slowest_of_three_is_never_the_better_of_two() {
        let slow = View { latency: 1.0, ..view() };
        let hits = spread(&[view(), slow, view()]);
        assert_eq!(hits[1], 0);
        assert!(hits[0] > 1000 && hits[2] > 1000, "{hits:?}");
    }

    #[test]
    fn equal_connections_share_evenly_and_load_counts() {
        let hits = spread(&[view(), view(), view(), view()]);
        assert!(hits.iter().all(|h| (500..1000).contains(h)), "{hits:?}");
        let busy = View { open_streams: 10, ..view() };
        assert_eq!(spread(&[busy, view()]), [0, 3000]);
    }

    #[test]
    fn weights_that_differ_are_kept_whatever_the_latency_and_the_number_of_connections() {
        let of = |endpoint, weight| View { endpoint, weight, ..view() };
        let slow = View { latency: 1.0, open_streams: 9, ..of(1, 50) };
        let bulk = View { bulk_streams: 1, ..of(3, 20) };
        // Two connections to the second endpoint: its share is one all the same.
        let hits = spread(&[slow, of(2, 30), of(2, 30), bulk]);
        let shares = [hits[0], hits[1] + hits[2], hits[3]];
        for (hits, expected) in shares.into_iter().zip([1500, 900, 600]) {
            assert!(hits.abs_diff(expected) < 150, "{shares:?}");
        }
        // Who can't take it leaves its share to the others; one refused is drawn no more.
        let stalled = View { silent: true, ..slow };
        let hits = spread(&[stalled, of(2, 30), of(3, 10)]);
        assert!(hits[0] == 0 && hits[1].abs_diff(2250) < 150, "{hits:?}");
        let refused = View { usable: false, ..of(2, 30) };
        assert_eq!(spread(&[refused, of(3, 10)]), [0, 3000]);
        assert_eq!(spread(&[stalled, View { silent: true, ..of(2, 50) }])[0], 0, "alike: by latency");
    }

    #[test]
    fn requests_avoid_bulk_then_stalls_then_saturation() {
        let bulk = View { bulk_streams: 1, ..view() };
        let silent = View { silent: true, ..view() };
        let stalled = View { stalled: true, ..view() };
        let full = View { saturated: true, ..view() };
        assert_eq!(spread(&[bulk, view()]), [0, 3000]);
        assert_eq!(spread(&[stalled, bulk]), [0, 3000]);
        assert_eq!(spread(&[silent, bulk]), [0, 3000]);
        assert_eq!(spread(&[full, stalled]), [0, 3000]);
        assert_eq!(pick(&[View { usable: false, ..view() }], 7), None);
        assert_eq!(pick(&[], 7), None);
    }

    #[test]
    fn connections_are_wanted_up_to_the_endpoints_and_beyond_only_beside_bulk() {
        let most = super::super::PoolLimits::default().connections;
        assert_eq!(demand(&[], most, 0), Demand::AnyEndpoint);
        assert_eq!(demand(&[view()], most, 2), Demand::AnotherEndpoint);
        assert_eq!(demand(&[view(), view()], most, 2), Demand::None);
        assert_eq!(demand(&[view(); 4], most, 900), Demand::None, "a subset of many endpoints");
        let bulk = View { bulk_streams: 1, ..view() };
        assert_eq!(demand(&[bulk], most, 1), Demand::AnyEndpoint);
        assert_eq!(demand(&[bulk, view()], most, 1), Demand::None);
        assert_eq!(demand(&[bulk; 8], most, 1), Demand::None, "never more than twice");
        let avoided = View { usable: false, ..view() };
        assert_eq!(demand(&[avoided], most, 1), Demand::AnotherEndpoint);
    }
}

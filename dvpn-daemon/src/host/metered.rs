//! Whether the network costs by the byte, as far as `NetworkManager` knows.

use super::dns::bus::{self, Object};

const MANAGER: Object<'_> = Object {
    service: "org.freedesktop.NetworkManager",
    path: "/org/freedesktop/NetworkManager",
    interface: "org.freedesktop.NetworkManager",
};

/// Asks it. Where it does not run, or does not know, a network is not metered.
pub async fn is_metered() -> bool {
    let Ok(bus) = bus::connect().await else {
        return false;
    };
    if !bus::runs(&bus, MANAGER.service).await {
        return false;
    }
    match MANAGER.property::<u32>(&bus, "Metered").await {
        Ok(says) => costs(says),
        Err(error) => {
            tracing::debug!("asking NetworkManager whether this network is metered: {error}");
            false
        }
    }
}

/// `NMMetered`: 1 is yes, 3 is a guess of yes; 0, 2 and 4 are unknown, no and a guess of no.
fn costs(says: u32) -> bool {
    matches!(says, 1 | 3)
}

#[cfg(test)]
mod tests {
    use super::costs;

    #[test]
    fn a_guess_of_yes_is_a_yes_and_not_to_know_is_a_no() {
        assert_eq!([0, 1, 2, 3, 4, 99].map(costs), [false, true, false, true, false, false]);
    }
}

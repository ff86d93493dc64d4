//! What a configuration without a mistake may still surprise its owner with.

use super::{Config, Mode};

impl Config {
    /// A sentence each: what is missing before anything can be done, and what may not be what was meant.
    pub fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        match &self.pool_url {
            None => remarks.push("POOL_URL is not set: there is no pool to connect to".to_owned()),
            Some(url) if !url.path().ends_with("/providers") => remarks.push(format!(
                "POOL_URL does not end in /providers: approvals will be asked for at {url}/approve"
            )),
            Some(_) => {}
        }
        if self.payment_api_url.is_none() {
            remarks.push("PAYMENT_API_URL is not set: nothing can be paid and no payment verified".to_owned());
        }
        if self.node.register && !self.node.accept_terms {
            remarks.push(
                "NODE_REGISTER_ENABLED=true has no effect before NODE_ACCEPT_TERMS=true: strangers' traffic will leave \
                 by your address, and no payouts exist"
                    .to_owned(),
            );
        }
        let line = &self.bandwidth;
        if self.node.register
            && self.node.accept_terms
            && line.total_bits_per_second.is_none()
            && line.test_url.is_none()
        {
            remarks.push(
                "neither BANDWIDTH_TOTAL_MBPS nor BANDWIDTH_TEST_URL is set: nobody knows what this line carries, and this \
                 node takes no clients"
                    .to_owned(),
            );
        }
        if self.tunnel.mode == Mode::Device && !self.tunnel.kill_switch {
            remarks.push("KILL_SWITCH=false: while no tunnel stands, everything leaves beside it".to_owned());
        }
        remarks
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Secret, Source, parse};

    fn remarks(values: &[(&'static str, &str)]) -> Vec<String> {
        let mut source = Source::new("test");
        for (name, value) in values {
            source.insert(*name, Secret::new(*value));
        }
        parse(&[source]).unwrap().remarks()
    }

    #[test]
    fn a_good_configuration_says_what_it_still_lacks() {
        let whole = [
            ("POOL_URL", "https://pool.example/providers"),
            ("PAYMENT_API_URL", "https://pool.example/payment"),
        ];
        assert_eq!(remarks(&whole), [""; 0]);
        for (more, words) in [
            (("POOL_URL", ""), "no pool"),
            (("PAYMENT_API_URL", ""), "nothing can be paid"),
            (
                ("POOL_URL", "https://pool.example/list"),
                "https://pool.example/list/approve",
            ),
            (("NODE_REGISTER_ENABLED", "true"), "NODE_ACCEPT_TERMS=true"),
        ] {
            let values: Vec<_> = whole
                .into_iter()
                .filter(|(name, _)| *name != more.0)
                .chain([more])
                .collect();
            let said = remarks(&values);
            assert!(said.len() == 1 && said[0].contains(words), "{more:?}: {said:?}");
        }
        let provider = [
            whole[0],
            whole[1],
            ("NODE_REGISTER_ENABLED", "true"),
            ("NODE_ACCEPT_TERMS", "true"),
        ];
        assert!(remarks(&provider)[0].contains("takes no clients"));
        for line in [
            ("BANDWIDTH_TOTAL_MBPS", "5"),
            ("BANDWIDTH_TEST_URL", "https://pool.example/speed"),
        ] {
            let values: Vec<_> = provider.into_iter().chain([line]).collect();
            assert_eq!(remarks(&values), [""; 0]);
        }
        let device = [whole[0], whole[1], ("TUNNEL_MODE", "device"), ("KILL_SWITCH", "false")];
        assert!(remarks(&device)[0].contains("beside it"));
    }
}

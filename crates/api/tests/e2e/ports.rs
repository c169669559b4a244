//! Forms of `-p` that mean nothing: the same table for Docker's daemon and ours.

use crate::Host;
use brigantine_testkit::Client;

both![a_publish_that_means_nothing_is_refused];

fn a_publish_that_means_nothing_is_refused(client: Client) {
    let host = Host::new(client);
    for form in [
        "80:80:80:80",
        "9000-9001:90-92",
        "70000:80",
        "80:70000",
        "91-90:90",
        "80/odd",
        "1.2.3:80:80",
        "nowhere:80:80",
        "80:",
        ":",
        "-5:80",
    ] {
        let output = host.cli(["run", "--rm", &format!("-p={form}"), "busybox", "true"]).exits(125);
        assert!(output.stderr.lines().any(|line| !line.is_empty()), "{form}: {output}");
    }
    assert_eq!(host.cli(["ps", "-aq"]).ok(), "");
    host.assert_nothing_left();
}

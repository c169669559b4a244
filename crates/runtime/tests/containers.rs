//! Real containers: what is promised about them, seen from inside.

mod common;

use common::{Case, able};

#[test]
fn a_container_runs_and_says_so() {
    if !able() {
        return;
    }
    let case = Case::new("echo hello; hostname; echo $$; id -u; pwd; echo $HOME");
    assert_eq!(case.output(), "hello\nship\n1\n0\n/\n/root\n");
}

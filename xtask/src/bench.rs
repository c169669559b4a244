pub fn run(_rounds: u32) -> anyhow::Result<()> {
    anyhow::bail!("not yet")
}

use std::sync::Mutex;

use super::*;
use crate::dockerfile::{Rule, parse};
use crate::graph::{Action, Op};

/// Images that are there, whatever they are called; what was asked for is remembered.
#[derive(Default)]
struct Shelf {
    architecture: String,
    on_build: Vec<String>,
    asked: Mutex<Vec<String>>,
}

impl Resolver for Shelf {
    fn resolve<'a>(
        &'a self,
        name: &'a str,
        _platform: &'a Platform,
    ) -> Pin<Box<dyn Future<Output = Result<Base>> + Send + 'a>> {
        Box::pin(async move {
            self.asked.lock().unwrap().push(name.to_owned());
            let host = Platform::host();
            let mut config = ImageConfig { os: host.os, ..ImageConfig::default() };
            config.architecture =
                if self.architecture.is_empty() { host.architecture } else { self.architecture.clone() };
            config.config.env = Some(vec!["BASE=b".to_owned()]);
            config.config.on_build = Some(self.on_build.clone()).filter(|all| !all.is_empty());
            Ok(Base { config, diff_ids: vec![format!("sha256:{}", "0".repeat(64))] })
        })
    }
}

fn run(text: &str, options: &Options, ignore: &str, shelf: &Shelf) -> Result<Plan> {
    let file = parse(text).map_err(|fault| Error::fault(fault, "Dockerfile", text))?;
    let ignore = Ignore::parse(ignore).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(convert(&file, "Dockerfile", text, options, &ignore, shelf))
}

fn plan(text: &str) -> Plan {
    run(text, &Options::default(), "", &Shelf::default()).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn told(text: &str, ignore: &str, shelf: &Shelf) -> Vec<(Rule, usize)> {
    let plan =
        run(text, &Options::default(), ignore, shelf).unwrap_or_else(|error| panic!("{text}: {error}"));
    plan.warnings.iter().map(|warning| (warning.rule, warning.span.first)).collect()
}

/// One Dockerfile that breaks each rule, with the line that is blamed, and one beside it that does not.
#[test]
fn every_check_finds_what_it_is_for_and_nothing_else() {
    use Rule::*;
    let host = Platform::host().architecture;
    let cases: &[(Rule, usize, &str, &str)] = &[
        (ConsistentInstructionCasing, 2, "FROM a\nrun x\nRUN y", "from a\nrun x\nrun y"),
        (ConsistentInstructionCasing, 2, "FROM a\nRun x\nRUN y", "FROM a\nRUN x"),
        (CopyIgnoredFile, 2, "FROM a\nCOPY sub/secret.key /", "FROM a\nCOPY sub/open.txt sub/*.key /x/"),
        (DuplicateStageName, 2, "FROM a AS x\nFROM b AS x", "FROM a AS x\nFROM b AS y"),
        (ExposeInvalidFormat, 2, "FROM a\nEXPOSE 127.0.0.1:80:8080", "FROM a\nEXPOSE 80 8000-8010/udp"),
        (ExposeProtoCasing, 2, "FROM a\nEXPOSE 80/TcP", "FROM a\nEXPOSE 80/tcp"),
        (FromAsCasing, 1, "FROM a as x", "FROM a AS x"),
        (
            FromPlatformFlagConstDisallowed,
            1,
            &format!("FROM --platform=linux/{host} a AS x"),
            &format!("FROM --platform=linux/{host} a AS x-{host}"),
        ),
        (InvalidDefaultArgInFrom, 2, "ARG TAG\nFROM a:${TAG}", "ARG TAG=1\nFROM a:${TAG}"),
        (
            InvalidDefinitionDescription,
            4,
            "# check=experimental=all\n\n# something else\nARG A=1\nFROM a",
            "# check=experimental=all\n\n# A is described\nARG A=1\n# far off\n\nFROM a AS x",
        ),
        (JsonArgsRecommended, 2, "FROM a\nCMD x y", "FROM a\nSHELL [\"/b\"]\nCMD x"),
        (JsonArgsRecommended, 2, "FROM a\nENTRYPOINT x", "FROM a\nENTRYPOINT [\"x\"]"),
        (LegacyKeyValueFormat, 2, "FROM a\nENV x y", "FROM a\nENV x=y"),
        (LegacyKeyValueFormat, 2, "FROM a\nLABEL x y", "FROM a\nLABEL x=y"),
        (MaintainerDeprecated, 2, "FROM a\nMAINTAINER me", "FROM a\nLABEL maintainer=me"),
        (MultipleInstructionsDisallowed, 2, "FROM a\nCMD [\"x\"]\nCMD [\"y\"]", "FROM a\nCMD [\"y\"]"),
        (NoEmptyContinuation, 3, "FROM a\nRUN x \\\n\n  y", "FROM a\nRUN x \\\n  y"),
        (RedundantTargetPlatform, 1, "FROM --platform=$TARGETPLATFORM a", "FROM --platform=$BUILDPLATFORM a"),
        (ReservedStageName, 1, "FROM a AS context", "FROM a AS contexts"),
        (SecretsUsedInArgOrEnv, 2, "FROM a\nENV DB_PASSWORD=x", "FROM a\nENV SSH_PUBLIC_KEY=x KEYBOARD=y"),
        (SecretsUsedInArgOrEnv, 2, "FROM a\nARG TOKEN", "FROM a\nARG TOKENS"),
        (StageNameCasing, 1, "FROM a AS Build", "FROM a AS build"),
        (UndefinedArgInFrom, 2, "ARG VERSION=1\nFROM a:1$VERSON", "ARG VERSION=1\nFROM a:1$VERSION"),
        (
            UndefinedVar,
            3,
            "FROM a\nENV NAME=x\nLABEL a=$NAM",
            "FROM a\nARG D\nENV N=$BASE\nLABEL a=$N$D${X:-y}",
        ),
        (UndefinedVar, 2, "FROM a\nCOPY $src /", "FROM a\nRUN echo $anything \"$1\""),
        (WorkdirRelativePath, 2, "FROM a\nWORKDIR x", "FROM a\nWORKDIR /x\nWORKDIR y"),
    ];
    let ignore = "sub/*.key\n";
    for (rule, line, bad, good) in cases {
        assert_eq!(told(bad, ignore, &Shelf::default()), [(*rule, *line)], "{bad}");
        assert_eq!(told(good, ignore, &Shelf::default()), [], "{good}");
    }
    let other = Shelf { architecture: "s390x".to_owned(), ..Shelf::default() };
    assert_eq!(told("FROM a", "", &other), [(InvalidBaseImagePlatform, 1)]);
    for rule in Rule::ALL {
        let tried = cases.iter().any(|(one, ..)| *one == rule) || rule == InvalidBaseImagePlatform;
        assert!(tried, "no case for {rule}");
        assert_eq!(serde_json::to_value(rule).unwrap(), rule.name());
    }
}

#[test]
fn checks_are_switched_by_directive_comment_and_argument() {
    let bad = "FROM a\nMAINTAINER me\nCMD x";
    let with = |head: &str| plan(&format!("{head}{bad}"));
    let rules = |plan: &Plan| plan.warnings.iter().map(|warning| warning.rule.name()).collect::<Vec<_>>();
    assert_eq!(rules(&with("")), ["MaintainerDeprecated", "JSONArgsRecommended"]);
    assert!(!with("").refused);
    let skipped = with("# check=skip=maintainerdeprecated;error=true\n");
    assert_eq!((rules(&skipped), skipped.refused), (vec!["JSONArgsRecommended"], true));
    let silent = with("# check=skip=all;error=true\n");
    assert!(silent.warnings.is_empty() && !silent.refused);
    let one = plan("FROM a\n# check=skip=MaintainerDeprecated\nMAINTAINER me\nMAINTAINER you");
    assert_eq!(one.warnings.iter().map(|w| w.span.first).collect::<Vec<_>>(), [4]);
    let mut options = Options::default();
    options.build_args.insert("BUILDKIT_DOCKERFILE_CHECK".to_owned(), Some("skip=all".to_owned()));
    let text = format!("# check=error=true\n{bad}");
    assert!(run(&text, &options, "", &Shelf::default()).unwrap().warnings.is_empty());
    for wrong in ["skip", "error=perhaps", "only=x"] {
        let error = run(&format!("# check={wrong}\n{bad}"), &Options::default(), "", &Shelf::default());
        assert!(error.unwrap_err().to_string().contains("invalid check option"), "{wrong}");
    }
}

/// What each instruction leaves in history and configuration, as BuildKit's frontend writes it.
#[test]
fn history_has_the_frontends_words() {
    for (text, words) in [
        ("ENV A=1 B=\"x y\"", "ENV A=1 B=x y"),
        ("LABEL a=b", "LABEL a=b"),
        ("EXPOSE 80 53/udp", "EXPOSE [53/udp 80/tcp]"),
        ("VOLUME /a /b", "VOLUME [/a /b]"),
        ("USER 1:2", "USER 1:2"),
        ("STOPSIGNAL SIGINT", "STOPSIGNAL SIGINT"),
        ("SHELL [\"/b\", \"-c\"]", "SHELL [/b -c]"),
        ("CMD [\"a\", \"b\"]", "CMD [\"a\" \"b\"]"),
        ("CMD a b", "CMD [\"/bin/sh\" \"-c\" \"a b\"]"),
        ("WORKDIR /w", "WORKDIR /w"),
        ("RUN true", "RUN /bin/sh -c true # buildkit"),
        ("RUN [\"true\"]", "RUN true # buildkit"),
        ("COPY --chown=1:2 a b/ /d/", "COPY --chown=1:2 a b/ /d/ # buildkit"),
        ("ARG X=1", "ARG X=1"),
    ] {
        let plan = plan(&format!("FROM a\n{text}"));
        let last = plan.history.last().unwrap();
        assert_eq!(
            (last.created_by.as_str(), last.comment.as_str()),
            (words, "buildkit.dockerfile.v0"),
            "{text}"
        );
    }
    // Declared arguments are told, with or without a value; a proxy that is only given is not.
    let with_args = plan("FROM a\nARG X=1\nENV Y=0\nARG HTTP_PROXY=p NONE Y=2\nENV X=3\nRUN true");
    let told = "RUN |4 X=3 HTTP_PROXY=p NONE= Y=2 /bin/sh -c true # buildkit";
    assert_eq!(with_args.history.last().unwrap().created_by, told);
}

#[test]
fn only_what_the_target_needs_is_resolved() {
    let shelf = Shelf::default();
    let text = "FROM one AS a\nFROM two AS b\nFROM a AS c\nCOPY --from=three /x /\nFROM b";
    let options = Options { target: Some("c".to_owned()), ..Options::default() };
    run(text, &options, "", &shelf).unwrap();
    assert_eq!(*shelf.asked.lock().unwrap(), ["one", "three"]);
    let missing = Options { target: Some("d".to_owned()), ..Options::default() };
    let error = run(text, &missing, "", &shelf).unwrap_err().to_string();
    assert!(error.contains("could not be found (stages: a, b, c)"), "{error}");
    for (text, words) in [
        ("FROM a AS x\nCOPY --from=x /a /b", "copies from itself"),
        ("FROM a AS z\nCOPY --from=later /a /b\nFROM b AS later\nFROM z", "comes later"),
        ("FROM a\nCOPY --from=7 /a /b", "no stage of that number"),
        ("FROM a\nRUN --mount=type=bind,target=/ true", "invalid mount target"),
        ("FROM a\nRUN --security=insecure true", "not allowed"),
        ("FROM a\nADD --checksum=sha256:0 a b /c/", "one HTTP or git source"),
        ("FROM a\nCOPY http://x/y /z", "can't be a URL"),
        ("FROM a\nEXPOSE x", "invalid containerPort"),
        ("FROM a\nSTOPSIGNAL SIGNONE", "invalid signal"),
        ("FROM \"\"", "should not be blank"),
    ] {
        let error = run(text, &Options::default(), "", &Shelf::default()).unwrap_err().to_string();
        assert!(error.contains(words) && error.starts_with("Dockerfile:"), "{text}: {error}");
    }
}

#[test]
fn triggers_of_the_base_run_first_and_are_gone() {
    let shelf = Shelf { on_build: vec!["COPY a /a".to_owned(), "ENV T=1".to_owned()], ..Shelf::default() };
    let plan = run("FROM base\nENV U=$T", &Options::default(), "", &shelf).unwrap();
    assert_eq!(plan.config.config.on_build, None);
    assert!(plan.config.config.env.iter().flatten().any(|line| line == "U=1"));
    let Op::Files(actions) = &plan.graph.get(plan.target).op else { panic!() };
    assert!(matches!(&actions[..], [Action::Copy { sources, .. }] if sources == &["a"]));
    assert_eq!(plan.steps[0].triggers, 2);
}

#[test]
fn only_the_language_that_is_built_in_is_read() {
    for syntax in [
        "docker/dockerfile",
        "docker/dockerfile:1.26",
        "docker.io/docker/dockerfile:1-labs@sha256:0000",
        "docker/dockerfile-upstream:master",
        "dockerfile.v0",
    ] {
        plan(&format!("# syntax={syntax}\nFROM a"));
    }
    let refused = |text: &str, options: &Options| match run(text, options, "", &Shelf::default()) {
        Err(Error::NotImplemented(text)) => text,
        other => panic!("{other:?}"),
    };
    let told = refused("# syntax=example.com/buildpacks:1\nFROM a", &Options::default());
    assert!(told.contains("example.com/buildpacks:1"), "{told}");
    let mut options = Options::default();
    options.build_args.insert("BUILDKIT_SYNTAX".to_owned(), Some("other/docker/dockerfile".to_owned()));
    refused("FROM a", &options);
    // The argument goes before the directive.
    options.build_args.insert("BUILDKIT_SYNTAX".to_owned(), Some("docker/dockerfile:1".to_owned()));
    assert!(run("# syntax=x/y\nFROM a", &options, "", &Shelf::default()).is_ok());
}

#[test]
fn sources_by_name_are_not_filled_in() {
    for text in [
        "FROM a AS x\nFROM b\nARG S=x\nCOPY --from=$S f /",
        "FROM a AS x\nFROM b\nRUN --mount=from=${S},target=/m true",
    ] {
        let error = run(text, &Options::default(), "", &Shelf::default()).unwrap_err().to_string();
        assert!(error.contains("variable") && error.contains(">>>"), "{text}: {error}");
    }
}

#[test]
fn what_a_target_takes_is_found_in_the_stages_it_needs() {
    let text = "# V is the version\nARG V=1\nARG W=w$V\nARG NOBODY\nFROM a:$W AS one\nARG V X=x$V\n\
        RUN --mount=type=secret,target=/s/key --mount=type=ssh,id=k,required true\n\
        FROM b AS two\nARG TWO\nFROM scratch\nCOPY --from=one / /\n";
    let file = parse(text).unwrap();
    let mut options = Options::default();
    options.build_args.insert("V".to_owned(), Some("2".to_owned()));
    let told = outline::outline(&file, text, &options).unwrap();
    let args: Vec<_> =
        told.args.iter().map(|a| (a.name.as_str(), a.value.as_str(), a.description.as_str())).collect();
    assert_eq!(args, [("W", "w2", ""), ("V", "2", "is the version"), ("X", "x2", "")]);
    let names =
        |all: &[outline::Wanted]| all.iter().map(|w| (w.name.clone(), w.required)).collect::<Vec<_>>();
    assert_eq!(names(&told.secrets), [("key".to_owned(), false)]);
    assert_eq!(names(&told.ssh), [("k".to_owned(), true)]);
    options.target = Some("two".to_owned());
    let told = outline::outline(&file, text, &options).unwrap();
    assert_eq!(told.args.iter().map(|a| a.name.as_str()).collect::<Vec<_>>(), ["TWO"]);
    let targets = outline::targets(&file, text, &options).unwrap().targets;
    let shown: Vec<_> = targets.iter().map(|t| (t.name.as_str(), t.base.as_str(), t.default)).collect();
    assert_eq!(shown, [("one", "a:w2", false), ("two", "b", true), ("", "scratch", false)]);
}

fn scans(text: &str, args: &[(&str, &str)]) -> Result<Vec<String>> {
    let build_args = args.iter().map(|(name, value)| ((*name).to_owned(), Some((*value).to_owned())));
    let mut options = Options { build_args: build_args.collect(), ..Options::default() };
    let asked = run(text, &options, "", &Shelf::default())?;
    assert!(asked.scans.is_empty(), "nobody asked for an SBOM");
    options.export.sbom = true;
    let plan = run(text, &options, "", &Shelf::default())?;
    for vertex in &plan.graph.vertices {
        assert!(!format!("{:?}", vertex.op).contains("SBOM_SCAN_STAGE="), "{vertex:?}");
    }
    Ok(plan.scans.into_keys().collect())
}

#[test]
fn an_sbom_may_tell_of_the_context_and_of_other_stages_that_are_made() {
    const STAGES: &str = "FROM a AS one\nRUN x\nFROM a\nRUN y\nFROM a AS alone\nRUN z\nFROM a AS last\nCOPY --from=one /x /\nCOPY --from=1 /y /\n";
    const STAGE: &str = "BUILDKIT_SBOM_SCAN_STAGE";
    let with = |line: &str| format!("ARG {line}\n{STAGES}");
    let told = |text: &str, args: &[(&str, &str)]| scans(text, args).unwrap();
    assert!(told(STAGES, &[]).is_empty());
    assert_eq!(told(&with("BUILDKIT_SBOM_SCAN_CONTEXT=true"), &[]), ["context"]);
    assert_eq!(told(STAGES, &[("BUILDKIT_SBOM_SCAN_CONTEXT", "1")]), ["context"]);
    assert_eq!(told(&with("BUILDKIT_SBOM_SCAN_STAGE=true"), &[]), ["one", "stage-1"]);
    assert_eq!(told(&with("BUILDKIT_SBOM_SCAN_STAGE=alone,ONE"), &[]), ["one"]);
    assert_eq!(told(&with("BUILDKIT_SBOM_SCAN_STAGE=one"), &[(STAGE, "stage-1")]), ["stage-1"]);
    assert!(told(&with("BUILDKIT_SBOM_SCAN_STAGE=true"), &[(STAGE, "false")]).is_empty());
    // A stage's own argument holds for it, and for what is built on it.
    let own = "FROM a AS one\nARG BUILDKIT_SBOM_SCAN_STAGE=true\nRUN echo $BUILDKIT_SBOM_SCAN_STAGE\nFROM one AS two\nRUN y\nFROM a AS three\nRUN z\nFROM a\nARG BUILDKIT_SBOM_SCAN_STAGE=true\nCOPY --from=two /y /\nCOPY --from=three /z /\n";
    assert_eq!(told(own, &[]), ["one", "two"]);
    let error = |text: &str| scans(text, &[]).unwrap_err().to_string();
    let wrong = error(&with("BUILDKIT_SBOM_SCAN_STAGE=one,yes"));
    assert!(wrong.contains("\"yes\" is neither true nor false nor a stage's name"), "{wrong}");
}

#[test]
fn a_stage_that_is_one_source_from_elsewhere_is_known() {
    let only = |text: &str, args: &[(&str, &str)]| {
        let build_args = args.iter().map(|(name, value)| ((*name).to_owned(), Some((*value).to_owned())));
        let options = Options { build_args: build_args.collect(), ..Options::default() };
        only_source(&parse(text).unwrap(), &options, 0)
    };
    let text = "ARG HOST=h\nFROM scratch AS s\nARG HOST FILE=f\nADD https://$HOST/$FILE /\nFROM a\n";
    assert!(
        matches!(only(text, &[("FILE", "g")]).unwrap(), Op::Http { url, checksum: None, .. } if url == "https://h/g")
    );
    let git = "FROM scratch\nADD --checksum=abc https://h/r.git#v1 /\n";
    let op = only(git, &[]).unwrap();
    assert!(
        matches!(&op, Op::Git { reference, checksum: Some(sum), .. } if reference == "v1" && sum == "abc"),
        "{op:?}"
    );
    for (text, words) in [
        ("FROM a\nADD https://h/f /\n", "not FROM scratch"),
        ("FROM scratch\nARG A\n", "no ADD of a URL"),
        ("FROM scratch\nADD f /\n", "one ADD of a URL"),
        ("FROM scratch\nADD https://h/f https://h/g /d/\n", "one ADD of a URL"),
        ("FROM scratch\nADD https://h/f /\nADD https://h/g /\n", "one ADD of a URL"),
        ("FROM scratch\nADD https://h/f /\nWORKDIR /x\n", "WORKDIR /x"),
    ] {
        let error = only(text, &[]).unwrap_err();
        assert!(error.contains(words), "{text}: {error}");
    }
}

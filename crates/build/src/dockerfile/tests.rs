use std::collections::BTreeMap;

use super::*;

fn only(text: &str) -> Command {
    let file = parse(&format!("FROM x\n{text}")).unwrap_or_else(|fault| panic!("{text:?}: {fault}"));
    assert_eq!(file.stages[0].instructions.len(), 1, "{text:?}");
    file.stages[0].instructions[0].command.clone()
}

fn fault(text: &str) -> Fault {
    match parse(text) {
        Err(fault) => fault,
        Ok(file) => panic!("{text:?} was taken: {file:?}"),
    }
}

#[test]
fn lines_are_joined_and_comments_dropped() {
    let file = parse("\u{feff}# syntax=docker/dockerfile:1\r\n# escape=`\r\n\r\nFROM a as B\r\n  run echo `\r\n  # no\r\n\r\n   two   `  \r\n three\r\n").unwrap();
    assert_eq!(file.directives.syntax.as_deref(), Some("docker/dockerfile:1"));
    assert_eq!(file.directives.escape, '`');
    assert_eq!(file.stages[0].name(), Some("b"));
    let Command::Run { form: Form::Shell(text), .. } = &file.stages[0].instructions[0].command else {
        panic!()
    };
    assert_eq!(text, "echo    two    three");
    assert_eq!(file.stages[0].instructions[0].span, Span { first: 5, last: 9, column: 3 });
    assert_eq!(file.warnings[0].rule, Rule::NoEmptyContinuation);
}

#[test]
fn directives_stand_at_the_very_top() {
    assert_eq!(parse("\n# escape=`\nFROM a").unwrap().directives.escape, '\\');
    assert_eq!(parse("# note\n# escape=`\nFROM a").unwrap().directives.escape, '\\');
    assert_eq!(parse("# unknown=x\n# escape=`\nFROM a").unwrap().directives.escape, '\\');
    assert_eq!(
        parse("#!/usr/bin/env x\n#Check = skip=all \nFROM a").unwrap().directives.check.as_deref(),
        Some("skip=all")
    );
    assert!(fault("# escape=`\n# escape=`\nFROM a").message.contains("only one escape"));
    assert!(fault("# escape=x\nFROM a").message.contains("invalid escape token"));
}

#[test]
fn heredocs_belong_to_their_instruction() {
    let Command::Run { heredocs, form: Form::Shell(text), .. } =
        only("RUN <<EOF cat >x && 3<<-'B' cat\na\n\tb $c\nEOF\n\tin\n\tB\n")
    else {
        panic!()
    };
    assert_eq!(text, "<<EOF cat >x && 3<<-'B' cat");
    assert_eq!(heredocs[0].content, "a\n\tb $c\n");
    assert!(heredocs[0].expand && !heredocs[0].chomp);
    assert_eq!((heredocs[1].content.as_str(), heredocs[1].fd), ("in\n", 3));
    assert!(!heredocs[1].expand && heredocs[1].chomp);
    let Command::Copy { sources, heredocs, destination, .. } = only("COPY a <<x /d/\ntext\nx") else {
        panic!()
    };
    assert_eq!((sources, destination.as_str()), (vec!["a".to_owned()], "/d/"));
    assert_eq!(heredocs[0].name, "x");
    let Command::OnBuild(text) = only("ONBUILD RUN <<E\nls\nE") else { panic!() };
    assert_eq!(text, "RUN <<E\nls\nE");
    // Neither a here-string nor arithmetic nor JSON opens one.
    for text in ["RUN cat <<<word", "RUN echo $((1<<2))", "RUN [\"cat\", \"<<EOF\"]", "CMD <<EOF"] {
        only(text);
    }
    assert!(fault("FROM x\nRUN <<EOF\nnever ends").message.contains("unterminated heredoc"));
    assert!(fault("FROM x\nCOPY a <<b\nb").message.contains("heredoc as a destination"));
}

#[test]
fn forms_and_flags() {
    assert_eq!(only("CMD [\"a\", \"b c\"]"), Command::Cmd(Form::Exec(vec!["a".into(), "b c".into()])));
    assert_eq!(only("CMD [a, b]"), Command::Cmd(Form::Shell("[a, b]".into())));
    assert!(fault("FROM x\nCMD [1]").message.contains("only string type"));
    assert!(fault("FROM x\nSHELL sh -c").message.contains("JSON form"));
    let Command::Copy { flags, sources, .. } =
        only("COPY --link --chown=\"a b\":c --exclude=*.o --exclude=x --from=0 -- --s d")
    else {
        panic!()
    };
    assert!(flags.link && !flags.parents);
    assert_eq!((flags.chown.as_deref(), flags.from.as_deref()), (Some("a b:c"), Some("0")));
    assert_eq!((flags.exclude.len(), sources[0].as_str()), (2, "--s"));
    for (bad, words) in [
        ("COPY --form=x a b", "did you mean from"),
        ("COPY --link --link a b", "duplicate flag"),
        ("COPY --link=maybe a b", "expecting boolean"),
        ("COPY --from a b", "missing a value"),
        ("COPY --from=$x a b", "variable expansion is not supported for --from"),
        ("COPY a", "at least two arguments"),
        ("RUM x", "did you mean RUN"),
        ("ENV a", "must have two arguments"),
        ("ENV a=b c", "can't find ="),
        ("ENV =b", "names can not be blank"),
        ("ONBUILD ONBUILD RUN x", "Chaining ONBUILD"),
        ("ONBUILD FROM x", "isn't allowed as an ONBUILD trigger"),
        ("HEALTHCHECK --interval=1us CMD x", "cannot be less than 1ms"),
        ("HEALTHCHECK x", "Unknown type"),
        ("VOLUME [\"\"]", "can not be an empty string"),
        ("WORKDIR", "exactly one argument"),
        ("FROM a b", "one or three arguments"),
        ("FROM a AS 1b", "invalid name for build stage"),
    ] {
        let fault = fault(&format!("FROM x\n{bad}"));
        assert!(fault.message.contains(words), "{bad}: {}", fault.message);
        assert_eq!(fault.span.first, 2, "{bad}");
    }
    assert!(fault("RUN x").message.contains("no build stage"));
    assert!(fault("").message.contains("no instructions"));
    assert!(fault("ARG a").message.contains("no stages"));
    let excerpt = fault("FROM x\n  RUM y\n").excerpt("Dockerfile", "FROM x\n  RUM y\n");
    assert!(excerpt.starts_with("Dockerfile:2:3: unknown instruction: RUM"), "{excerpt}");
    assert!(excerpt.contains("   2 | >>>   RUM y"), "{excerpt}");
}

#[test]
fn mounts_are_decoded() {
    let parse = |text: &str| Mount::parse(text, &|value| Ok(value.to_owned()));
    let mount = parse("type=cache,dst=/x,sharing=locked,mode=0700,uid=5,\"id=a,b\"").unwrap();
    assert_eq!(
        (mount.kind, mount.target.as_deref(), mount.id.as_deref()),
        (MountKind::Cache, Some("/x"), Some("a,b"))
    );
    assert_eq!((mount.mode, mount.uid, mount.sharing.as_str()), (Some(0o700), Some(5), "locked"));
    assert_eq!(parse("target=/x,rw").unwrap().read_only, Some(false));
    assert_eq!(parse("type=tmpfs,target=/x,size=2m").unwrap().size, Some(2 << 20));
    assert!(parse("type=secret,id=a,required").unwrap().required);
    for bad in [
        "type=x,target=/",
        "type=bind",
        "type=tmpfs,target=/x,uid=1",
        "type=cache,target=/x,sharing=no",
        "target",
        "\"a",
    ] {
        assert!(parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn variables_and_quotes() {
    let variables: BTreeMap<String, String> =
        [("a", "A b"), ("empty", ""), ("path", "/usr/lib/x.tar.gz"), ("n", "a")]
            .map(|(k, v)| (k.into(), v.into()))
            .into();
    let shell = Shell::new('\\', &variables);
    for (text, expected) in [
        ("$a", "A b"),
        ("${a}c", "A bc"),
        ("'$a'", "$a"),
        ("\"$a\"", "A b"),
        ("\\$a", "$a"),
        ("\"\\$a\\x\"", "$a\\x"),
        ("x\\ y", "x y"),
        ("$none", ""),
        ("$", "$"),
        ("a$ b", "a$ b"),
        ("${none:-d}", "d"),
        ("${empty:-d}", "d"),
        ("${empty-d}", ""),
        ("${none-d}", "d"),
        ("${none:-${a}x}", "A bx"),
        ("${a:+y}", "y"),
        ("${empty:+y}", ""),
        ("${empty+y}", "y"),
        ("${path#*/}", "usr/lib/x.tar.gz"),
        ("${path##*/}", "x.tar.gz"),
        ("${path%.*}", "/usr/lib/x.tar"),
        ("${path%%.*}", "/usr/lib/x"),
        ("${path/lib/share}", "/usr/share/x.tar.gz"),
        ("${path//\\//-}", "-usr-lib-x.tar.gz"),
        ("${path/x.*/}", "/usr/lib/"),
        ("${path/?ar/zip}", "/usr/lib/x.zip.gz"),
        ("${a:?no}", "A b"),
        ("$1x", "x"),
    ] {
        assert_eq!(shell.word(text).as_deref(), Ok(expected), "{text}");
    }
    for (bad, words) in [
        ("${a", "missing '}'"),
        ("${none:?is not there}", "none: is not there"),
        ("'x", "single-quote"),
        ("\"x", "double-quote"),
        ("${}", "bad substitution"),
        ("${a~x}", "unsupported modifier"),
    ] {
        let error = shell.word(bad).unwrap_err();
        assert!(error.contains(words), "{bad}: {error}");
    }
    assert_eq!(shell.words("$a '$a' c\\ d").unwrap(), ["A", "b", "$a", "c d"]);
    assert_eq!(Shell::new('\\', &variables).raw().word("\"$n\" 'x' \\$n \\n").unwrap(), "\"a\" 'x' $n \\n");
    assert!(shell.unset().contains(&"none".to_owned()));
}

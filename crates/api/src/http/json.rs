//! Request bodies in JSON, read the way Go's decoder reads them for dockerd.
//!
//! Keys match a struct's fields whatever their case, unknown keys are ignored, null means the zero value, and the
//! keys of free maps (labels, driver options) keep their spelling. Invariant: an error names the path of the value
//! that was wrong (`HostConfig.Memory`).

use std::fmt;

use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess,
    SeqAccess, Unexpected, VariantAccess, Visitor,
};
use serde_json::Value;

use super::Error;

/// Parses a whole body; trailing content is an error, an empty body is one too.
pub fn from_slice<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(Error::invalid("invalid JSON: got EOF while reading request body"));
    }
    let value: Value =
        serde_json::from_slice(body).map_err(|error| Error::invalid(format!("invalid JSON: {error}")))?;
    if !value.is_object() && !value.is_array() && !value.is_null() {
        return Err(Error::invalid("invalid JSON: the request body is not an object"));
    }
    from_value(value)
}

/// Converts a parsed value by the same rules.
pub fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, Error> {
    T::deserialize(Lenient { value, key: None })
        .map_err(|error| Error::invalid(format!("invalid JSON: {error}")))
}

/// What was wrong and, built up while the error travels outwards, where.
#[derive(Debug)]
struct JsonError {
    path: Vec<String>,
    message: String,
}

impl JsonError {
    fn within(mut self, step: String) -> Self {
        self.path.push(step);
        self
    }
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, step) in self.path.iter().rev().enumerate() {
            if index > 0 && !step.starts_with('[') {
                f.write_str(".")?;
            }
            f.write_str(step)?;
        }
        if !self.path.is_empty() {
            f.write_str(": ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for JsonError {}

impl de::Error for JsonError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { path: Vec::new(), message: message.to_string() }
    }
}

/// A deserializer over a parsed value with Go's leniency.
struct Lenient {
    value: Value,
    /// The field or map key this value stands under, for the two fields that take a string or a list.
    key: Option<String>,
}

/// Fields that docker reads as a list even when a plain string is sent.
const STRING_OR_LIST: [&str; 2] = ["Cmd", "Entrypoint"];

impl Lenient {
    fn plain(value: Value) -> Self {
        Self { value, key: None }
    }

    fn is_null(&self) -> bool {
        self.value.is_null()
    }

    fn wrong<'de, V: Visitor<'de>>(self, visitor: &V) -> JsonError {
        let unexpected = match &self.value {
            Value::Null => Unexpected::Unit,
            Value::Bool(on) => Unexpected::Bool(*on),
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(n), _, _) => Unexpected::Unsigned(n),
                (_, Some(n), _) => Unexpected::Signed(n),
                (_, _, Some(n)) => Unexpected::Float(n),
                _ => Unexpected::Other("number"),
            },
            Value::String(text) => Unexpected::Str(text),
            Value::Array(_) => Unexpected::Seq,
            Value::Object(_) => Unexpected::Map,
        };
        de::Error::invalid_type(unexpected, visitor)
    }

    fn forward<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, JsonError> {
        self.value.into_deserializer().deserialize_any(visitor).map_err(de::Error::custom)
    }
}

macro_rules! number {
    ($($method:ident $visit:ident),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, JsonError> {
            match &self.value {
                Value::Null => visitor.$visit(Default::default()),
                Value::Number(_) => self.forward(visitor),
                _ => Err(self.wrong(&visitor)),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for Lenient {
    type Error = JsonError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, JsonError> {
        match self.value {
            Value::Array(items) => visit_list(items, visitor),
            Value::Object(object) => visit_object(object, &[], visitor),
            value => Self::plain(value).forward(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, JsonError> {
        if self.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, JsonError> {
        match &self.value {
            Value::Null => visitor.visit_bool(false),
            Value::Bool(on) => visitor.visit_bool(*on),
            _ => Err(self.wrong(&visitor)),
        }
    }

    number!(
        deserialize_i8 visit_i8, deserialize_i16 visit_i16, deserialize_i32 visit_i32, deserialize_i64 visit_i64,
        deserialize_u8 visit_u8, deserialize_u16 visit_u16, deserialize_u32 visit_u32, deserialize_u64 visit_u64,
        deserialize_f32 visit_f32, deserialize_f64 visit_f64
    );

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, JsonError> {
        match self.value {
            Value::Null => visitor.visit_str(""),
            Value::String(text) => visitor.visit_string(text),
            _ => Err(self.wrong(&visitor)),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, JsonError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, JsonError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, JsonError> {
        if self.is_null() { visitor.visit_unit() } else { Err(self.wrong(&visitor)) }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, JsonError> {
        let lists = self.key.as_deref().is_some_and(|key| STRING_OR_LIST.contains(&key));
        match self.value {
            Value::Null => visit_list(Vec::new(), visitor),
            Value::Array(items) => visit_list(items, visitor),
            Value::String(text) if lists => visit_list(vec![Value::String(text)], visitor),
            value => Err(Self::plain(value).wrong(&visitor)),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, JsonError> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, JsonError> {
        match self.value {
            Value::Null => visit_object(serde_json::Map::new(), &[], visitor),
            Value::Object(object) => visit_object(object, &[], visitor),
            value => Err(Self::plain(value).wrong(&visitor)),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, JsonError> {
        match self.value {
            Value::Null => visit_object(serde_json::Map::new(), fields, visitor),
            Value::Object(object) => visit_object(object, fields, visitor),
            value => Err(Self::plain(value).wrong(&visitor)),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, JsonError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, JsonError> {
        match self.value {
            Value::Null => visitor.visit_enum(Variant { name: String::new(), value: None }),
            Value::String(name) => visitor.visit_enum(Variant { name, value: None }),
            Value::Object(object) if object.len() == 1 => {
                let (name, value) = object.into_iter().next().unwrap_or_default();
                let name =
                    variants.iter().find(|v| v.eq_ignore_ascii_case(&name)).map_or(name, |v| (*v).to_owned());
                visitor.visit_enum(Variant { name, value: Some(value) })
            }
            value => Err(Self::plain(value).wrong(&visitor)),
        }
    }

    serde::forward_to_deserialize_any! { i128 u128 bytes byte_buf unit_struct tuple_struct identifier ignored_any }
}

fn visit_list<'de, V: Visitor<'de>>(items: Vec<Value>, visitor: V) -> Result<V::Value, JsonError> {
    visitor.visit_seq(List { items: items.into_iter(), index: 0 })
}

fn visit_object<'de, V: Visitor<'de>>(
    object: serde_json::Map<String, Value>,
    fields: &'static [&'static str],
    visitor: V,
) -> Result<V::Value, JsonError> {
    // A field spelt exactly wins over one that only matches without case, whatever their order.
    let mut entries: Vec<(String, Value)> = Vec::with_capacity(object.len());
    let mut exact: Vec<bool> = Vec::with_capacity(object.len());
    for (key, value) in object {
        let canonical =
            fields.iter().find(|field| **field == key).map(|field| (*field, true)).or_else(|| {
                fields.iter().find(|field| field.eq_ignore_ascii_case(&key)).map(|field| (*field, false))
            });
        let (name, is_exact) =
            canonical.map_or((key, true), |(field, is_exact)| (field.to_owned(), is_exact));
        match entries.iter().position(|(known, _)| *known == name) {
            Some(at) if is_exact || !exact[at] => {
                entries[at] = (name, value);
                exact[at] = is_exact;
            }
            Some(_) => {}
            None => {
                entries.push((name, value));
                exact.push(is_exact);
            }
        }
    }
    visitor.visit_map(Entries { entries: entries.into_iter(), current: None })
}

struct List {
    items: std::vec::IntoIter<Value>,
    index: usize,
}

impl<'de> SeqAccess<'de> for List {
    type Error = JsonError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, JsonError> {
        let Some(value) = self.items.next() else { return Ok(None) };
        let index = self.index;
        self.index += 1;
        seed.deserialize(Lenient::plain(value)).map(Some).map_err(|error| error.within(format!("[{index}]")))
    }
}

struct Entries {
    entries: std::vec::IntoIter<(String, Value)>,
    current: Option<(String, Value)>,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = JsonError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, JsonError> {
        let Some((key, value)) = self.entries.next() else { return Ok(None) };
        let name = key.clone();
        self.current = Some((key, value));
        seed.deserialize(name.into_deserializer()).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, JsonError> {
        let Some((key, value)) = self.current.take() else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        seed.deserialize(Lenient { value, key: Some(key.clone()) }).map_err(|error| error.within(key))
    }
}

struct Variant {
    name: String,
    value: Option<Value>,
}

impl<'de> EnumAccess<'de> for Variant {
    type Error = JsonError;
    type Variant = Content;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Content), JsonError> {
        let name = seed.deserialize(self.name.into_deserializer())?;
        Ok((name, Content(self.value)))
    }
}

struct Content(Option<Value>);

impl<'de> VariantAccess<'de> for Content {
    type Error = JsonError;

    fn unit_variant(self) -> Result<(), JsonError> {
        match self.0 {
            None => Ok(()),
            Some(_) => Err(de::Error::custom("expected a plain string")),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, JsonError> {
        seed.deserialize(Lenient::plain(self.0.unwrap_or_default()))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, JsonError> {
        Lenient::plain(self.0.unwrap_or_default()).deserialize_seq(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, JsonError> {
        Lenient::plain(self.0.unwrap_or_default()).deserialize_struct("", fields, visitor)
    }
}

#[cfg(test)]
mod tests {
    use bollard_stubs::models::{ContainerCreateBody, HostConfig, RestartPolicyNameEnum};

    use super::*;

    fn create(text: &str) -> Result<ContainerCreateBody, String> {
        from_slice(text.as_bytes()).map_err(|error| error.message)
    }

    #[test]
    fn keys_match_without_case_except_in_free_maps() {
        let body = create(
            r#"{"image":"x","CMD":["a"],"hostconfig":{"networkmode":"none","portbindings":{"80/tcp":[{"hostport":"1"}]}},
               "labels":{"Image":"y","image":"z"},"unknown":{"deep":[1]}}"#,
        )
        .unwrap();
        assert_eq!(body.image.as_deref(), Some("x"));
        assert_eq!(body.cmd, Some(vec!["a".to_owned()]));
        let host = body.host_config.unwrap();
        assert_eq!(host.network_mode.as_deref(), Some("none"));
        let ports = host.port_bindings.unwrap();
        assert_eq!(ports["80/tcp"].as_ref().unwrap()[0].host_port.as_deref(), Some("1"));
        let labels = body.labels.unwrap();
        assert_eq!((labels["Image"].as_str(), labels["image"].as_str()), ("y", "z"));
    }

    #[test]
    fn the_exact_spelling_wins() {
        assert_eq!(create(r#"{"IMAGE":"a","Image":"b","image":"c"}"#).unwrap().image.as_deref(), Some("b"));
    }

    #[test]
    fn null_is_the_zero_value() {
        let body = create(
            r#"{"Image":null,"HostConfig":{"PortBindings":{"80/tcp":null},"Memory":null,"Binds":null,
                "RestartPolicy":{"Name":""}},"Labels":{"a":null},"Env":[null],"ExposedPorts":{"80/tcp":null}}"#,
        )
        .unwrap();
        assert_eq!(body.image, None);
        assert_eq!(body.env, Some(vec![String::new()]));
        assert_eq!(body.labels.unwrap()["a"], "");
        assert_eq!(body.exposed_ports, Some(vec!["80/tcp".to_owned()]));
        let host = body.host_config.unwrap();
        assert_eq!(host.restart_policy.unwrap().name, Some(RestartPolicyNameEnum::EMPTY));
    }

    #[test]
    fn a_command_may_be_a_plain_string() {
        let body = create(r#"{"Cmd":"echo hi","Entrypoint":"sh"}"#).unwrap();
        assert_eq!(body.cmd, Some(vec!["echo hi".to_owned()]));
        assert_eq!(body.entrypoint, Some(vec!["sh".to_owned()]));
        assert!(create(r#"{"Env":"A=b"}"#).is_err());
    }

    #[test]
    fn an_error_names_the_path() {
        let error = create(r#"{"HostConfig":{"Memory":"lots"}}"#).unwrap_err();
        assert!(
            error.starts_with("invalid JSON: HostConfig.Memory: invalid type: string \"lots\""),
            "{error}"
        );
        let error = create(r#"{"Env":["A=b",{}]}"#).unwrap_err();
        assert!(error.starts_with("invalid JSON: Env[1]: "), "{error}");
        assert!(create("").unwrap_err().contains("EOF"));
        assert!(create("{}{}").unwrap_err().contains("trailing"));
        assert!(create("{\"a\":").unwrap_err().starts_with("invalid JSON"));
        assert!(create("7").unwrap_err().contains("not an object"));
    }

    #[test]
    fn a_deeply_nested_body_is_an_error_and_no_crash() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(create(&deep).is_err());
    }

    #[test]
    fn numbers_may_be_any_width() {
        let host: HostConfig = from_slice(br#"{"Memory":9223372036854775807,"OomScoreAdj":-500}"#).unwrap();
        assert_eq!((host.memory, host.oom_score_adj), (Some(i64::MAX), Some(-500)));
        assert!(from_slice::<HostConfig>(br#"{"Memory":99999999999999999999}"#).is_err());
    }
}

//! The system bus, as far as the name services are asked over it. Every question ends.

use std::{fmt::Debug, time::Duration};

use tokio::time::timeout;
use zbus::{
    Connection,
    export::serde::Serialize,
    fdo::DBusProxy,
    names::BusName,
    zvariant::{DynamicDeserialize, DynamicType, OwnedValue, Value},
};

use super::Error;

/// How long a service may take to answer; one that the bus first starts too.
const PATIENCE: Duration = Duration::from_secs(5);

/// An object of a service.
#[derive(Clone, Copy)]
pub(in crate::host) struct Object<'a> {
    pub(in crate::host) service: &'static str,
    pub(in crate::host) path: &'a str,
    pub(in crate::host) interface: &'static str,
}

/// Connects; the address is that of `DBUS_SYSTEM_BUS_ADDRESS`, or the usual one.
pub(in crate::host) async fn connect() -> Result<Connection, Error> {
    match timeout(PATIENCE, Connection::system()).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(source)) => Err(Error::Bus(Box::new(source))),
        Err(_) => Err(Error::Silent {
            service: "the system bus",
            what: "a connection".to_owned(),
        }),
    }
}

/// Whether a service runs now. It is not started.
pub(in crate::host) async fn runs(bus: &Connection, service: &'static str) -> bool {
    let ask = async {
        let name = BusName::try_from(service)?;
        Ok::<_, zbus::Error>(DBusProxy::new(bus).await?.name_has_owner(name).await?)
    };
    match timeout(PATIENCE, ask).await {
        Ok(Ok(runs)) => runs,
        Ok(Err(error)) => {
            tracing::debug!("asking the bus for {service}: {error}");
            false
        }
        Err(_) => false,
    }
}

impl Object<'_> {
    /// Calls a method.
    pub(in crate::host) async fn call<B, R>(&self, bus: &Connection, method: &str, body: &B) -> Result<R, Error>
    where
        B: Serialize + DynamicType + Sync,
        R: for<'d> DynamicDeserialize<'d>,
    {
        let call = async {
            let reply = bus
                .call_method(Some(self.service), self.path, Some(self.interface), method, body)
                .await?;
            reply.body().deserialize::<R>()
        };
        self.limited(method, call).await
    }

    /// Reads a property.
    pub(in crate::host) async fn property<T>(&self, bus: &Connection, name: &str) -> Result<T, Error>
    where
        T: TryFrom<OwnedValue>,
        T::Error: Debug + Into<zbus::Error>,
    {
        let properties = Object {
            interface: "org.freedesktop.DBus.Properties",
            ..*self
        };
        let value: OwnedValue = properties.call(bus, "Get", &(self.interface, name)).await?;
        T::try_from(value).map_err(|source| Error::Call {
            service: self.service,
            what: name.to_owned(),
            source: Box::new(source.into()),
        })
    }

    /// Sets a property.
    pub(in crate::host) async fn set_property(
        &self,
        bus: &Connection,
        name: &str,
        value: Value<'_>,
    ) -> Result<(), Error> {
        let properties = Object {
            interface: "org.freedesktop.DBus.Properties",
            ..*self
        };
        properties.call(bus, "Set", &(self.interface, name, value)).await
    }

    async fn limited<T>(&self, what: &str, asked: impl Future<Output = zbus::Result<T>>) -> Result<T, Error> {
        match timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(source)) => Err(Error::Call {
                service: self.service,
                what: what.to_owned(),
                source: Box::new(source),
            }),
            Err(_) => Err(Error::Silent {
                service: self.service,
                what: what.to_owned(),
            }),
        }
    }
}

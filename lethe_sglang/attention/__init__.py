"""SGLang's attention backends with decode over packed rows."""

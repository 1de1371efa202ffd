"""Library GEMMs on any device, in any dtype: what the other back ends are held against."""

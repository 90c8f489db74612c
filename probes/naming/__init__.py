"""Names: tensors of any architecture as (out, in) matrices with a layer and a component."""

"""The destination site: replicas in pools, served over gRPC."""

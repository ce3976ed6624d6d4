"""Put stochastic depth on a model and take it off again. The one package that changes a model."""

variable "bucket" {
  description = "Name of the bucket that holds sources, latents, models and samples."
  type        = string
}

variable "ledger_patterns" {
  description = "Keys that are created once and never written again, anywhere in the bucket: the datasets' ledgers."
  type        = list(string)
  default = [
    "*/dataset.json",
    "*/plan/v*.json",
    "*/generations/*/announced.json",
    "*/generations/*/identity.json",
    "*/generations/*/open.json",
    "*/generations/*/closed.json",
    "*/ledger/*",
    "*/checkpoints/starts/*.json",
  ]
}

variable "oidc_issuers" {
  description = "Clusters whose service accounts may take the role: ARN of the OIDC provider by issuer without https://."
  type        = map(string)
}

variable "service_accounts" {
  description = "Who may take which role: the service account, as namespace:name, by the part of a cluster it is for."
  type        = map(string)
  default = {
    head   = "latentloom:latentloom-head"
    worker = "latentloom:latentloom-worker"
  }
}

variable "source_prefixes" {
  description = "Where what jobs only read lies in the bucket: sources, codecs, networks and prompts of yours."
  type        = list(string)
  default     = ["images", "codecs", "networks", "prompts"]
}

variable "deletable_patterns" {
  description = "Keys that each role may delete."
  type        = map(list(string))
  default = {
    head   = ["*"]
    worker = ["*/checkpoints/*"]
  }
}

variable "noncurrent_days" {
  description = "Days for which a deleted or replaced object can be brought back."
  type        = number
  default     = 14
}

variable "vpc_id" {
  description = "The clusters' network, for a gateway endpoint to the bucket; of use with route_table_ids alone."
  type        = string
  default     = null
}

variable "route_table_ids" {
  description = "Route tables of the nodes' subnets, which get a way to S3 beside the NAT gateway; none: no endpoint."
  type        = list(string)
  default     = []
}

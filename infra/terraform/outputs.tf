output "store" {
  description = "LATENTLOOM_STORE of the settings in infra/kuberay."
  value       = "s3://${aws_s3_bucket.data.id}"
}

output "role_arns" {
  description = "Of heads and of workers: for the annotations of the service accounts (EKS) or AWS_ROLE_ARN (GKE)."
  value       = { for part, role in aws_iam_role.jobs : part => role.arn }
}
